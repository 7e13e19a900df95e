"""How a job is spread over ranks, and the one table of rules that makes a layout legal.

A rule is a predicate over integers *or numpy columns*, so that the trainer checks one layout in words
and a search checks many thousand at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import Field

from colossus.architecture import Architecture
from colossus.errors import UserError
from colossus.section import Name, Section, derived
from colossus.words import plural

AXES = ("dp_replicate", "dp_shard", "pp", "cp", "tp")

Schedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"
]
Recompute = Literal["none", "selective", "full"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
RECOMPUTES: tuple[str, ...] = get_args(Recompute)
NONE = RECOMPUTES.index("none")
ONE_STAGE = ("gpipe", "1f1b")  # a rank has one stage of the model
V_SHAPED = ("zbv_zero_bubble", "dualpipe_v")  # a rank has two: the first ranks also have the last stages
PADDED = 128  # tokens of a vocabulary on a rank, of which it is padded to a multiple
MUCH_PADDING = 1.1  # times the tokens that there are
INTERLEAVED = (
    "interleaved_1f1b",
    "interleaved_zero_bubble",
)  # a rank has several, in rounds of micro batches
ZERO_BUBBLE = ("interleaved_zero_bubble", *V_SHAPED)  # the weights' gradients are computed apart
SIMPLEST: Mapping[str, Any] = {
    **dict.fromkeys((*AXES, "ep", "etp", "stages_per_rank", "micro_batch"), 1),
    "schedule": "1f1b",
    "cp_method": "gather",
    "recompute": "none",
    "zero": 3,
    "async_tp": False,
    "compile": False,
    "pools": (),
}


class Pool(Section):
    """Replicas that are alike: so many of `dp_replicate`, what they compute at once, and what they keep.

    share: sequences of the global batch that each takes; by their measured speed where it is left out.
    """

    replicas: int = Field(ge=1, le=10**7)
    share: int | None = Field(default=None, ge=1, le=10**7)
    micro_batch: int | None = Field(default=None, ge=1, le=10**7)
    recompute: Recompute | None = None


class Layout(Section):
    """The `layout` section of a job. ranks = dp_replicate x dp_shard x pp x cp x tp; `ep` regroups them.

    ep: ranks that share one set of experts, of the dp_shard x cp (x tp, where etp is 1) that see different
    tokens; over what remains of these experts are sharded. etp: ranks of tp that share each expert.
    zero: what dp_shard divides while a step's micro batches are computed, as ZeRO counts it (arXiv
    1910.02054): 1 the optimizer's state and fp32 weights alone; 2 the sums of gradients too; 3 the weights
    that are computed with too, which are gathered for each use.
    """

    preset: Name | None = None
    dp_replicate: int = derived(ge=1, le=10**7)
    dp_shard: int = derived(ge=1, le=10**7)
    tp: int = derived(ge=1, le=10**7)
    pp: int = derived(ge=1, le=10**7)
    cp: int = derived(ge=1, le=10**7)
    ep: int = derived(ge=1, le=10**7)
    etp: int = derived(ge=1, le=10**7)
    schedule: Schedule = derived()
    stages_per_rank: int = derived(ge=1, le=10**5)  # of the pipeline
    cp_method: Literal["gather", "ulysses"] = derived()
    micro_batch: int = derived(ge=1, le=10**7)  # sequences that a rank computes at once
    recompute: Recompute = derived()
    recompute_layers: int | None = Field(default=None, ge=0, le=10**5)  # of a rank; None: all
    activation_gib: float | None = Field(default=None, gt=0, le=10**6)  # what follows: recompute_layers
    zero: int = derived(ge=1, le=3)  # what is sharded between micro batches
    async_tp: bool = derived()
    compile: bool = derived()
    pools: list[Pool] = derived()

    def filled(self) -> Layout:
        """With the simplest in place of what is open."""
        open_ = {name: value for name, value in SIMPLEST.items() if getattr(self, name) is None}
        return self.model_copy(update=open_)

    def of_replica(self, replica: int) -> Layout:
        """As the pool of one of the replicas has it."""
        ends = 0
        for pool in self.pools or ():
            ends += pool.replicas
            if replica < ends:
                own = {"micro_batch": pool.micro_batch, "recompute": pool.recompute}
                return self.model_copy(update={name: v for name, v in own.items() if v is not None})
        return self

    def fewest_rows(self, batch: int) -> int:
        """Sequences of a batch that a rank takes, of the ranks that have fewest and whose pool doesn't say
        itself how many it computes at once."""
        pools = self.pools or ()
        total = sum(pool.replicas * (pool.share or 0) for pool in pools) or self.dp_replicate or 1
        shares = [batch * (pool.share or 1) // total for pool in pools if pool.micro_batch is None]
        if not shares:
            return -(-batch // self.dp)
        return max(1, -(-min(shares) // (self.dp_shard or 1)))

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job; an axis that is not derived yet counts as 1."""
        ranks = 1
        for axis in AXES:
            ranks *= getattr(self, axis) or 1
        return ranks

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return (self.dp_replicate or 1) * (self.dp_shard or 1)

    @property
    def num_stages(self) -> int:
        """Of the pipeline: 1 without."""
        return (self.pp or 1) * (self.stages_per_rank or 1)


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """`holds(row)` is true where the layout is legal; `row` maps names to integers or numpy columns.

    field: what is wrong where it does not hold. reason: in words, after `field=value: `. near: the values of
    `field` that the message offers, of those that hold.
    """

    name: str
    field: str
    holds: Callable[[Row], Any]
    reason: Callable[[Row], str]

    @cached_property
    def asks(self) -> frozenset[str]:
        """The fields of a row that it reads."""
        read = _Read()
        self.holds(read)
        return frozenset(read)

    def message(self, *rows: Row, beside: Sequence[Rule] = ()) -> str:
        """What is broken in the first of `rows`, why, and the nearest values under which this rule, and those
        `beside` it, hold in all of them. A row may have the step from which on it holds: from_step."""
        row = rows[0]
        section = "run" if self.field == "global_batch" else "layout"
        near = " or ".join(map(str, self.nearest(*rows, beside=beside)))
        step = row.get("from_step")
        reason = f"from step {step} on: {self.reason(row)}" if step else self.reason(row)
        return f"{section}.{self.field}={row[self.field]}: {reason}" + (f"; {near}" if near else "")

    def nearest(self, *rows: Row, beside: Sequence[Rule] = ()) -> list[Any]:
        """The nearest smaller and larger value under which this rule, and those `beside` it, hold in all
        rows; of names, all. A batch is each row's own."""
        row = rows[0]
        rows = rows[:1] if self.field == "global_batch" else rows
        value = row[self.field]

        def holds(candidate: Any) -> bool:
            told = [{**each, self.field: candidate} for each in rows]
            return all(rule.holds(each) for rule in (self, *beside) for each in told)

        if isinstance(value, str):
            names = SCHEDULES if self.field == "schedule" else ("gather", "ulysses")
            return [name for name in names if holds(name)]
        if isinstance(value, bool):
            return ["false" if value else "true"]
        others = [n for name, n in row.items() if name != self.field and isinstance(n, int) and n < 2**16]
        most = max(64, *others, _dp(row) if self.field == "global_batch" else 0)  # no axis is above all sizes
        found = []
        for candidates in (range(min(value - 1, most), 0, -1), range(value + 1, most + 1)):
            found += next(([n] for n in candidates if holds(n)), [])
        return found


class _Read(dict[str, Any]):
    """A row of the simplest values, which has what it was asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = value = SIMPLEST[name] if name in ("schedule", "cp_method") else 1
        return value


def _dp(row: Row) -> Any:
    return row["dp_replicate"] * row["dp_shard"]


def _token_ranks(row: Row) -> Any:
    """Ranks of a replica that have different tokens, among which `ep` groups: see `Layout`."""
    return row["dp_shard"] * row["cp"] * (row["tp"] // row["etp"])


def _whole(row: Row) -> Any:
    """The global batch, padded to an equal count of sequences for every data-parallel rank."""
    return -(-row["global_batch"] // _dp(row)) * _dp(row)


def _num_micro_batches(row: Row) -> Any:
    return -(-row["global_batch"] // (_dp(row) * row["micro_batch"]))


def _divides(name: str, field: str, of: str, what: str, mend: Callable[[Row], str] | None = None) -> Rule:
    """`field` divides `of`, which counts `what`; 0 of them are no hindrance. mend: another way out."""
    return Rule(
        name,
        field,
        lambda row: row[of] % row[field] == 0,
        lambda row: f"must divide the {row[of]} {what}" + (mend(row) if mend is not None else ""),
    )


def _is(row: Row, field: str, *names: str) -> Any:
    """Whether `field` is one of `names`, for a row or by columns."""
    found = row[field] == names[0]
    for name in names[1:]:
        found = found | (row[field] == name)
    return found


def _not(truth: Any) -> Any:
    return not truth if isinstance(truth, bool) else ~truth


def _implies(condition: Any, consequence: Any) -> Any:
    return _not(condition) | consequence


def _same_rounds(row: Row) -> Any:
    """Interleaved schedules of PyTorch take micro batches in rounds of equal size."""
    count = _num_micro_batches(row)
    rounds = count // row["pp"]
    rounds = rounds + (rounds == 0)
    return count % rounds == 0


def _with_padding(row: Row) -> str:
    """A vocabulary with tokens that no text has, as published runs pad it: to whole columns of 128 on every
    rank (arXiv 1909.08053), or of a small one to the next multiple of tp."""
    tokens, tp = row["vocab_size"], row["tp"]
    wide, least = (-(-tokens // unit) * unit for unit in (PADDED * tp, tp))
    return f", or pad it: model.vocab_size={wide if wide < MUCH_PADDING * tokens else least}"


def _more_sequences(row: Row) -> str:
    """The batch that gives a rank as many micro batches as its pipeline has stages, where none is smaller."""
    if row["micro_batch"] > 1:
        return ""
    return f"; run.global_batch={_dp(row) * (row['pp'] * row['stages_per_rank'] - 1) + 1} or more"


RULES: tuple[Rule, ...] = (
    Rule(
        "ranks-fit-batch",
        "global_batch",
        lambda row: _dp(row) <= row["global_batch"],
        lambda row: (
            f"fewer sequences than the {_dp(row)} data-parallel ranks (layout.dp_replicate x layout.dp_shard)"
        ),
    ),
    Rule(
        "micro-batch-fits",
        "micro_batch",
        lambda row: row["micro_batch"] * _dp(row) <= _whole(row),
        lambda row: f"more than a rank's share of run.global_batch={row['global_batch']}",
    ),
    _divides("tp-heads", "tp", "num_heads", "attention heads"),
    _divides("tp-kv-heads", "tp", "num_kv_heads", "heads of keys and values"),
    _divides("tp-ffn", "tp", "ffn", "columns of the MLP"),
    _divides("tp-vocab", "tp", "vocab_size", "tokens of the vocabulary", _with_padding),
    Rule(
        "tp-node",
        "tp",
        lambda row: row["tp"] <= row["node_size"],
        lambda row: f"must stay inside a node of {row['node_size']} devices",
    ),
    Rule(
        "tp-sequence",
        "tp",
        lambda row: (row["tp"] == 1) | (row["seq_len"] % (row["tp"] * row["cp"]) == 0),
        lambda row: f"tp x cp must divide the {row['seq_len']} tokens of a sequence",
    ),
    Rule(
        "cp-sequence",
        "cp",
        lambda row: (
            (row["cp"] == 1) | (row["seq_len"] % (row["cp"] * (1 + _is(row, "cp_method", "gather"))) == 0)
        ),
        lambda row: (
            f"the {row['seq_len']} tokens of a sequence are cut into "
            f"{'2 x cp' if row['cp_method'] == 'gather' else 'cp'} equal parts"
        ),
    ),
    Rule(
        "ulysses-heads",
        "cp_method",
        lambda row: _implies(
            _is(row, "cp_method", "ulysses"), row["num_kv_heads"] % (row["tp"] * row["cp"]) == 0
        ),
        lambda row: (
            f"tp x cp = {row['tp'] * row['cp']} must divide the {row['num_kv_heads']} heads of keys, values"
        ),
    ),
    Rule(
        "etp-is-tp",
        "etp",
        lambda row: (row["etp"] == 1) | (row["etp"] == row["tp"]),
        lambda row: f"must be 1 or layout.tp={row['tp']}",
    ),
    _divides("etp-ffn", "etp", "expert_ffn", "columns of an expert"),
    Rule(
        "ep-needs-experts",
        "ep",
        lambda row: (row["ep"] == 1) | (row["num_experts"] > 0),
        lambda row: "the model has no experts",
    ),
    _divides("ep-experts", "ep", "num_experts", "experts"),
    Rule(
        "ep-ranks",
        "ep",
        lambda row: _token_ranks(row) % row["ep"] == 0,
        lambda row: (
            f"must divide the {_token_ranks(row)} ranks of dp_shard x cp{' x tp' if row['etp'] == 1 else ''}"
        ),
    ),
    Rule(
        "stages-of-schedule",
        "stages_per_rank",
        lambda row: (
            ((row["pp"] == 1) & (row["stages_per_rank"] == 1))
            | (
                (row["pp"] > 1)
                & _implies(_is(row, "schedule", *ONE_STAGE), row["stages_per_rank"] == 1)
                & _implies(_is(row, "schedule", *V_SHAPED), row["stages_per_rank"] == 2)
                & _implies(
                    _is(row, "schedule", *INTERLEAVED),
                    row["stages_per_rank"] > 1,
                )
            )
        ),
        lambda row: (
            "a rank has one stage without a pipeline"
            if row["pp"] == 1
            else f"layout.schedule={row['schedule']} has "
            + ("1" if row["schedule"] in ONE_STAGE else "2" if row["schedule"] in V_SHAPED else "2 or more")
        ),
    ),
    Rule(
        "pp-layers",
        "pp",
        lambda row: row["pp"] * row["stages_per_rank"] <= row["num_layers"],
        lambda row: (
            f"pp x stages_per_rank = {row['pp'] * row['stages_per_rank']} stages, and the model has "
            f"{row['num_layers']} layers"
        ),
    ),
    Rule(
        "pp-micro-batches",
        "micro_batch",
        lambda row: (
            (row["pp"] == 1)
            | _implies(
                _is(row, "schedule", "1f1b", "dualpipe_v"),
                _num_micro_batches(row) >= row["pp"] * row["stages_per_rank"],
            )
        ),
        lambda row: (
            f"gives {plural(_num_micro_batches(row), 'micro batch')} a rank; "
            f"layout.schedule={row['schedule']} needs at least as many as its "
            f"{row['pp'] * row['stages_per_rank']} stages{_more_sequences(row)}"
        ),
    ),
    Rule(
        "pp-rounds",
        "micro_batch",
        lambda row: (row["pp"] == 1) | _implies(_is(row, "schedule", *INTERLEAVED), _same_rounds(row)),
        lambda row: (
            f"gives {plural(_num_micro_batches(row), 'micro batch')} a rank, which layout.schedule="
            f"{row['schedule']} cannot cut into equal rounds of at least pp={row['pp']}"
        ),
    ),
    Rule(
        "no-compiled-zero-bubble",
        "schedule",
        lambda row: _not(_is(row, "schedule", *ZERO_BUBBLE) & (row["pp"] > 1) & (row["compile"] == 1)),
        lambda row: "compiled layers fail under it or give wrong gradients (layout.compile=false allows it)",
    ),
    Rule(
        "zero-bubble-divides-nothing",
        "zero",
        lambda row: _not(_is(row, "schedule", *ZERO_BUBBLE) & (row["pp"] > 1) & (row["zero"] > 1)),
        lambda row: (
            f"layout.schedule={row['schedule']} needs the weights that the forward pass gathered, and sums "
            "gradients in parts"
        ),
    ),
    Rule(
        "no-recomputed-zero-bubble",
        "schedule",
        lambda row: _not(_is(row, "schedule", *ZERO_BUBBLE) & (row["pp"] > 1) & (row["recompute"] != NONE)),
        # PyTorch computes a layer once more for each backward pass that reaches it: of its inputs, and of
        # each group of its weights (`findings/zero-bubble-recomputes-for-each-weight.sh`).
        lambda row: (
            "takes backward passes in parts, and each would compute layers once more "
            "(layout.recompute=none allows it)"
        ),
    ),
    Rule(
        "async-tp-hardware",
        "async_tp",
        lambda row: _implies(row["async_tp"] == 1, row["has_symmetric_memory"] == 1),
        lambda row: "only GPUs that reach each other's memory, with layout.compile=true, can overlap so",
    ),
)


def broken(row: Row) -> Iterator[tuple[Rule, Any]]:
    """Rules that ask for no more than `row` has, with where they are broken: what else a layout has can't
    mend that."""
    for rule in RULES:
        if rule.asks <= row.keys():
            yield rule, _not(rule.holds(row))


OF_POOLS = ("global_batch", "micro_batch")  # fields that pools have for themselves


def model_row(arch: Architecture) -> dict[str, int]:
    """What the rules ask about a model; what it has not is 0."""
    experts, expert_ffn = arch.experts, arch.expert_size
    widths = {arch.intermediate_size} if any(map(arch.has_mlp, range(arch.num_layers))) else set()
    if experts is not None and experts.num_shared:
        widths.add(experts.num_shared * expert_ffn)
    return {
        "num_heads": arch.num_heads,
        "num_kv_heads": arch.num_kv_heads,
        "num_layers": arch.num_layers,
        "ffn": _common(widths),
        "vocab_size": arch.vocab_size,
        "num_experts": experts.num_experts if experts is not None else 0,
        "expert_ffn": expert_ffn,
    }


def _common(widths: Iterable[int]) -> int:
    """The greatest number whose divisors divide all; 0 of none."""
    import math

    return math.gcd(*widths)


def layout_row(layout: Layout) -> dict[str, Any]:
    """Of a layout whose open fields count as the simplest."""
    filled = layout.filled()
    row = {name: getattr(filled, name) for name in SIMPLEST if name != "pools"}
    row["recompute"] = RECOMPUTES.index(row["recompute"])
    return {name: int(value) if isinstance(value, bool) else value for name, value in row.items()}


def violations(
    layout: Layout,
    arch: Architecture,
    *,
    global_batch: int,
    seq_len: int,
    node_size: int = 8,
    has_symmetric_memory: bool = False,
    later: Sequence[tuple[int, int, int]] = (),
) -> list[str]:
    """Every rule that `layout` breaks for a model and a fleet, in words with the nearest legal values.

    global_batch, seq_len: of the first step. later: (from step, global_batch, seq_len), wherever one of these
    changes.
    """
    row = layout_row(layout) | model_row(arch)
    row |= {"node_size": node_size, "has_symmetric_memory": int(has_symmetric_memory)}
    rows = [
        row | {"from_step": step, "global_batch": batch, "seq_len": length}
        for step, batch, length in ((0, global_batch, seq_len), *later)
    ]
    if not layout.pools:
        return in_words(RULES, rows)
    common = in_words([rule for rule in RULES if rule.field not in OF_POOLS], rows)
    return common + _pool_violations(layout, rows)


def in_words(rules: Iterable[Rule], rows: Sequence[Row]) -> list[str]:
    """What is wrong, as a rule says it of the first row in which it does not hold, with values of its field
    that mend all that is wrong with that and break nothing that is right. What holds once they are taken is
    no fault of its own. Of a name, as of a schedule, every cause has a way out of its own, and a line."""
    rules, found, told = list(rules), list[str](), set[str]()

    def is_broken(rule: Rule) -> bool:
        return not all(rule.holds(row) for row in rows)

    while (rule := next((r for r in rules if r.name not in told and is_broken(r)), None)) is not None:
        told.add(rule.name)
        at = next(index for index, row in enumerate(rows) if not rule.holds(row))
        judged = (rows[at], *rows[:at], *rows[at + 1 :])
        own = [other for other in rules if other.field == rule.field and is_broken(other)]
        read = [other for other in rules if rule.field in other.asks and not is_broken(other)]
        kept = [other for other in read if other.field == rule.field]
        choices = ([*own, *read], [*own, *kept], own)  # where no value pleases all, those of its own field
        beside = next((some for some in choices if rule.nearest(*judged, beside=some)), own)
        found.append(rule.message(*judged, beside=beside))
        near = rule.nearest(*judged, beside=beside)
        if near and not isinstance(near[0], str):
            rows = [{**row, rule.field: near[0]} for row in rows]
    return found


def _pool_violations(layout: Layout, rows: Sequence[Row]) -> list[str]:
    """Pools are judged one by one: a replica with its share is a layout of its own."""
    row = rows[0]
    pools, replicas = layout.pools, row["dp_replicate"]
    if sum(pool.replicas for pool in pools) != replicas:
        together = sum(pool.replicas for pool in pools)
        near = f"layout.dp_replicate={together}, or layout.pools=[] where replicas are alike"
        return [f"layout.pools: have {together} replicas together; layout.dp_replicate={replicas}; {near}"]
    given = [pool.share is not None for pool in pools]
    if any(given) and not all(given):
        return ["layout.pools: share is given for some and not for others; for all, or for none"]
    total = sum(pool.replicas * (pool.share or 0) for pool in pools)
    if all(given) and total != row["global_batch"]:
        batch = row["global_batch"]
        near = f"shares of {batch} together, or run.global_batch={total}"
        return [f"layout.pools: take {total} sequences together; run.global_batch={batch}; {near}"]
    found = []
    for number, pool in enumerate(pools):
        owns = []
        for each in rows:
            # A batch of another size is shared in the same proportions; who gets none has a row of padding.
            part, whole = (pool.share, total) if total else (1, replicas)
            least, rest = divmod(each["global_batch"] * (part or 0), whole)
            for share in (least, least + 1) if rest and pool.share else (least,):
                own = {**each, "dp_replicate": 1, "global_batch": max(1, share)}
                own["micro_batch"] = pool.micro_batch or row["micro_batch"]
                own["recompute"] = RECOMPUTES.index(pool.recompute) if pool.recompute else row["recompute"]
                owns.append(own)
        judged = [r for r in RULES if r.field in OF_POOLS or all(r.holds(each) for each in rows)]
        found += [f"layout.pools[{number}]: {message}" for message in in_words(judged, owns)]
    return found


def check(layout: Layout, arch: Architecture, **of: Any) -> None:
    """Raises `UserError` that names every broken rule; see `violations`."""
    broken = violations(layout, arch, **of)
    if broken:
        raise UserError("\n".join(broken))
