"""A plan: which layout, how fast, whether it fits, how many days, how much energy, money and loss.

`make_plan` answers for a job; what the job leaves open about its length and batch is said as an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from colossus.architecture import Architecture, num_active, num_parameters
from colossus.errors import UserError
from colossus.hardware.catalogue import accelerator, accelerator_names, table
from colossus.hardware.fleets import DAY, Hardware, hardware_of
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.layout import AXES, violations
from colossus.perf.flops import model_flops_per_token
from colossus.perf.price import Pricer
from colossus.perf.software import OURS
from colossus.planner.batch import critical_batch_tokens, default_batch, tokens_of_steps
from colossus.planner.columns import Layouts
from colossus.planner.confirm import Ask, Confirmed, confirmed
from colossus.planner.estimate import KEYS, Problem
from colossus.planner.formulas import RECOMPUTE, piece_of
from colossus.planner.goodput import Goodput, goodput, spare_nodes
from colossus.planner.losses import losses
from colossus.planner.measured import basis, corrections_for
from colossus.planner.search import Choice, Found, Limits, fixed_of, search
from colossus.planner.trust import Band, band_of
from colossus.words import count, memory, span

AIMS = ("time", "cost", "energy")
TOKENS_A_WEIGHT = 20  # of a whole run, where the job names no length (arXiv 2203.15556)
FAR_BEYOND = 1.5  # times the most memory of any accelerator, more than which is no advice
USUAL_MFU = 0.4  # by which a run of minutes gets its batch, before its step is known
FIELDS = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep", "etp", "schedule", "stages_per_rank",
          "micro_batch", "recompute", "zero")  # fmt: skip
PUBLISHED_REACH = 4.0  # a published run counts as near up to so many times the size


@dataclass(frozen=True)
class Costs:
    """Of a whole run at one rate of failures. energy in kWh, power in MW of the site, money in dollars."""

    goodput: Goodput
    days: float
    energy: float
    power: float
    money: float


@dataclass(frozen=True)
class Plan:
    """What `colossus plan` answers. best: the layout and what it costs; table: the best few, `best` first.

    low, high: costs where failures are rare and where they are many. assumptions: what nobody measured.
    basis: what the seconds rest on, and whether that was measured. spares: accelerators that failures ask to
    keep in reserve. with_all: seconds of a step with none in reserve. complete: whether all layouts were
    looked at before time ran out. band: how far the seconds can be trusted. by_clock: the run ends after
    `run.minutes`.
    """

    best: Choice
    table: tuple[Choice, ...]
    low: Costs
    high: Costs
    tokens: float
    seq_len: int
    global_batch: int
    precision: str
    hardware: Hardware
    arch: Architecture
    priced: int
    binding: str
    runner_up: str
    nearest: str
    assumptions: tuple[str, ...]
    basis: tuple[tuple[str, str], ...]
    problem: Problem
    limits: Limits
    band: Band
    confirmed: Confirmed
    spares: int = 0
    with_all: float = math.inf
    complete: bool = True
    by_clock: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.global_batch * self.seq_len / self.best.seconds

    def layout(self) -> dict[str, Any]:
        """The winner as values of the `layout` section."""
        return layout_values(self.best, self.global_batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.arch.model_dump(exclude_none=True),
            "num_parameters": num_parameters(self.arch),
            "num_active": num_active(self.arch),
            "layout": self.layout(),
            "step_seconds": self.best.seconds,
            "step_seconds_band": [self.best.seconds * (1 + sign * self.band.share) for sign in (-1, 1)],
            "band_rests_on": self.band.why,
            "accelerators": {"working": self.best.ranks, "reserve": self.reserve, "idle": self.idle},
            "mfu": self.best.mfu,
            "tokens_per_second": self.tokens_per_second,
            "memory_bytes": self.best.memory,
            "reserved_bytes": self.best.reserved,
            "parts_seconds": self.best.parts,
            "few_failures": asdict(self.low),
            "many_failures": asdict(self.high),
            "tokens": self.tokens,
            "global_batch": self.global_batch,
            "seq_len": self.seq_len,
            "rests_on": dict(self.basis),
            "assumptions": list(self.assumptions),
            "complete": self.complete,
            "dry_run_reserved_bytes": None if self.confirmed.best is None else self.confirmed.best.reserved,
            "refused": [
                {"layout": layout_values(answer.choice, self.global_batch), "reserved_bytes": answer.reserved}
                for answer in self.confirmed.refused
            ],
        }

    @property
    def reserve(self) -> int:
        """Accelerators that wait for failures."""
        return min(self.spares, self.hardware.count - self.best.ranks)

    @property
    def idle(self) -> int:
        """Accelerators that neither work nor are needed in reserve."""
        return self.hardware.count - self.best.ranks - self.reserve

    @property
    def _have_room(self) -> bool:
        """Whether those that are idle would make another replica, which is of one kind of accelerators."""
        row = self.best.row
        if not self.best.pools:
            return self.idle >= self.best.ranks // (row["dp_replicate"] * row["dp_shard"])
        size = self.best.ranks // row["dp_replicate"]  # that each pool has as many whole ones of
        replicas = {pool.accelerator: pool.replicas for pool in self.best.pools}
        left = [pool.count - size * replicas[pool.accelerator.name] for pool in self.hardware.pools]
        odd = sum(count % size for count in left)  # who wait in reserve first
        return sum(count // size for count in left) * size >= max(0, self.reserve - odd) + size

    def use(self) -> str:
        """Who works and who does not, in words."""
        one = self.best.ranks == 1
        kind = "rank" if self.hardware.accelerator.device == "cpu" else "accelerator"
        words = f"{self.best.ranks:,} {kind}{'' if one else 's'} work{'s' if one else ''}"
        words += f", {self.reserve:,} wait in reserve" if self.reserve else ""
        if self.idle:
            why = "they make no replica more"
            if len(self.hardware.pools) > 1:
                why = "of no kind are there enough for a replica more"
            if self._have_room:
                why = "no layout searched is better with them"
            words += f", {self.idle:,} {'is' if self.idle == 1 else 'are'} idle: {why}"
        if self.reserve < self.spares:
            words += f"; failures ask for {self.spares:,} in reserve"
        elif self.with_all < 0.995 * self.best.seconds:
            words += f" (with all at work {100 * (1 - self.with_all / self.best.seconds):.1f}% less a step)"
        return words


def layout_values(choice: Choice, global_batch: int) -> dict[str, Any]:
    """A choice as values of the `layout` section."""
    values = {name: choice.row[name] for name in (*FIELDS, "recompute_layers", "cp_method", "compile")}
    if choice.pools:
        # what does not add up to the batch is left to the run, which measures the pools
        whole = sum(pool.replicas * pool.share for pool in choice.pools) == global_batch
        values["pools"] = [
            {
                "replicas": p.replicas,
                "share": p.share if whole else None,
                "micro_batch": p.micro_batch,
                "recompute": p.recompute,
            }
            for p in choice.pools
        ]
    return values


def make_plan(
    job: Job,
    machine: Machine | None = None,
    aim: str = "time",
    *,
    whole: bool = False,
    ask: Ask | None = None,
) -> Plan:
    """Plans a job whose model is filled in (`derive.model`).

    machine: this one as measured, for a fleet that names no accelerators. whole: all of the fleet that is not
    in reserve must work. ask: what the training program needs (`dryrun.confirm`): the best is the quickest
    that fits by it, too.

    Raises:
        UserError: the job cannot be planned; NothingFits: no layout is legal and fits.
    """
    if aim not in AIMS:
        raise UserError.field("--for", aim, f"one of {', '.join(AIMS)}", AIMS)
    arch = job.model
    hardware = hardware_of(job.fleet, machine, ranks=_ranks(job))
    here = machine if job.fleet.accelerator is None and job.fleet.pools is None else None
    corrections = corrections_for(hardware, here)
    assumptions = list(hardware.assumptions)
    shapes = job.shapes()
    seq_len = max(length for _, _, length in shapes)
    if seq_len > min(length for _, _, length in shapes):
        assumptions.append(f"data.phases: every sample has {seq_len:,} tokens, as the longest")
    precision: str = job.precision.type or "bf16"
    if precision not in ("fp32", "bf16"):  # any float8 recipe
        precision = "fp8"
    spares, whole_fleet = 0 if whole else _spares(hardware), hardware.count
    batch = _batch(job, seq_len, hardware, assumptions)
    optimizer = job.optimizer.name or "adamw"
    if job.optimizer.name is None:
        assumptions.append("optimizer.name=adamw: what Muon takes beside it is counted where it is asked for")
    _check_pools(job, batch, hardware.node_size)
    problem = Problem(
        arch, seq_len, batch, precision, Pricer.of(hardware, OURS, corrections), optimizer,
        (*((step, Fraction(each, batch), length) for step, each, length in job.shapes(batch)),
         *_small_shares(job, batch)),
    )  # fmt: skip
    fixed = fixed_of(
        {name: getattr(job.layout, name) for name in (*FIELDS, "recompute_layers", "cp_method", "compile")}
    )
    if here is not None and here.device == "cpu" and here.compiler is None:
        fixed["compile"] = False
    if any(pool.share for pool in job.layout.pools or ()):
        assumptions.append("layout.pools: a step is priced as if all replicas had equal shares")
    budget = job.layout.activation_gib
    limits = Limits(fixed, spares, whole, math.inf if budget is None else budget * 2**30)
    usual = float(TOKENS_A_WEIGHT * num_active(arch))
    tokens = float(job.run.tokens or (job.run.steps or 0) * problem.tokens) or usual
    found, hardware = _search(problem, limits, aim, tokens)
    problem = problem.on(hardware)
    found, asked = (found, Confirmed()) if ask is None else confirmed(found, problem, ask)
    best = found.choices[0]
    limits = replace(limits, spares=spares * hardware.count // whole_fleet)
    if job.run.minutes is not None:
        tokens = 60 * job.run.minutes / best.seconds * problem.tokens
    elif job.run.tokens is None and job.run.steps is None:
        assumptions.append(f"run.tokens={count(tokens)}: {TOKENS_A_WEIGHT} a weight")
    low, high = (costs_of(hardware, best, tokens, batch * seq_len, rate) for rate in hardware.failures)
    part = hardware.accelerator
    others = {"fp8", "fp32"} - {precision}
    assumptions += [
        f"{part.name}: {words}" for words in part.assumed if not any(name in words for name in others)
    ]
    return Plan(
        best=best,
        table=found.choices,
        low=low,
        high=high,
        tokens=tokens,
        seq_len=seq_len,
        global_batch=batch,
        precision=precision,
        hardware=hardware,
        arch=arch,
        priced=found.priced,
        binding=_binding(found, problem),
        runner_up=_runner_up(found),
        nearest=nearest_published(arch, hardware),
        assumptions=tuple(assumptions),
        basis=tuple(basis(problem, layouts_of_row(best.row))),
        problem=problem,
        limits=limits,
        spares=limits.spares,
        with_all=found.all_working,
        complete=found.complete,
        band=_band(problem, layouts_of_row(best.row), here=here is not None),
        confirmed=asked,
        by_clock=job.run.minutes is not None,
    )


def _check_pools(job: Job, batch: int, node_size: int) -> None:
    """Raises `UserError` where a pool's share is too small for what the job itself says of its ranks."""
    pools = job.layout.pools or ()
    if not any(pool.share for pool in pools):
        return
    replicas = job.layout.dp_replicate or sum(pool.replicas for pool in pools)
    (_, first, length), *later = job.shapes(batch)
    broken = violations(
        job.layout.model_copy(update={"dp_replicate": replicas}), job.model,
        global_batch=first, seq_len=length, node_size=node_size, later=later,
    )  # fmt: skip
    if found := [text for text in broken if text.startswith("layout.pools")]:
        raise UserError("\n".join(found))


def _small_shares(job: Job, batch: int) -> Iterator[tuple[int, Fraction, int]]:
    """What pools ask of `layout.micro_batch` whose shares the job names: as shapes of the run in which all
    replicas had their share. Those that name a micro-batch of their own ask nothing."""
    pools = job.layout.pools or ()
    total = sum(pool.replicas * (pool.share or 0) for pool in pools)
    replicas = sum(pool.replicas for pool in pools)
    for share in {pool.share for pool in pools if pool.share and not pool.micro_batch}:
        for step, each, length in job.shapes(batch):
            yield step, Fraction(each, batch) * Fraction(share * replicas, total), length


def _band(problem: Problem, layout: Layouts, *, here: bool) -> Band:
    piece = piece_of({name: layout.number(name) for name in KEYS}, problem.seq_len)
    has_experts = problem.arch.experts is not None
    return band_of(problem.pricer, problem.ledger(piece), has_experts=has_experts, here=here)


def layouts_of_row(row: Mapping[str, Any]) -> Layouts:
    """One layout as columns."""
    return Layouts.of([{**row, "recompute": RECOMPUTE[row["recompute"]]}])


def _ranks(job: Job) -> int:
    """That the layout asks for, where it does; of a processor, which any number of ranks can share."""
    return math.prod(getattr(job.layout, axis) or 1 for axis in AXES)


def _spares(hardware: Hardware) -> int:
    """Accelerators in reserve at the high rate of failures, where there are servers to spare."""
    servers = hardware.count // hardware.server
    failures = hardware.failing(servers * hardware.server, hardware.failures[1])
    waiting = spare_nodes(failures, hardware.repair_seconds)
    return waiting * hardware.server if waiting < servers // 10 and servers >= 64 else 0


def laid_out(job: Job, machine: Machine | None = None) -> Job:
    """A job whose layout is the simplest around what was asked for: all that is left of the fleet shards. For
    one that no layout fits, by the formulas."""
    hardware = hardware_of(job.fleet, machine, ranks=_ranks(job))
    layout = job.layout
    if layout.dp_shard is None:
        others = layout.filled().num_ranks
        layout = layout.model_copy(update={"dp_shard": max(1, hardware.count // others)})
    layout = layout.filled()
    values = {f"layout.{name}": getattr(layout, name) for name in type(layout).model_fields}
    values = {name: value for name, value in values.items() if value is not None}
    seq_len = max(length for _, _, length in job.shapes())
    batch = _batch(job, seq_len, hardware, [])
    whole = layout.dp * layout.micro_batch
    values |= {"run.global_batch": max(whole, batch - batch % whole), "data.seq_len": seq_len}
    values |= {"optimizer.name": "adamw", "precision.type": "bf16"}
    return job.derive("planned", **values)


def _batch(job: Job, seq_len: int, hardware: Hardware, assumptions: list[str]) -> int:
    """Sequences of a step: what the job says, else the critical batch of the run's length."""
    run = job.run
    shared = sum(pool.replicas * (pool.share or 0) for pool in job.layout.pools or ())
    if run.global_batch is None and run.batch_schedule is None and shared:
        assumptions.append(f"run.global_batch={shared:,}: what layout.pools take together")
        return shared
    if run.global_batch is None and run.batch_schedule is not None:
        batch = max(sequences for _, sequences in run.batch_schedule)
        assumptions.append(f"run.batch_schedule: every step has {batch:,} sequences, as its largest")
        return batch
    if run.global_batch is not None:
        if not job.asked_for("run.global_batch"):
            assumptions.append(f"run.global_batch={run.global_batch:,}: what `train` takes here")
        return run.global_batch
    flops = model_flops_per_token(job.model, seq_len)
    if run.tokens is not None:
        tokens = float(run.tokens)
    elif run.steps is not None:
        tokens = tokens_of_steps(run.steps)
    elif run.minutes is not None:
        peaks = sum(
            pool.count * pool.accelerator.bf16 / pool.accelerator.shared_by for pool in hardware.pools
        )
        tokens = 60 * run.minutes * USUAL_MFU * peaks / flops
    else:
        tokens = float(TOKENS_A_WEIGHT * num_active(job.model))
    batch = default_batch(tokens, seq_len)
    assumptions.append(
        f"run.global_batch={batch:,}: {count(batch * seq_len)} tokens a step; critical for a run of "
        f"{count(tokens)} are {count(critical_batch_tokens(tokens))}"
    )
    return batch


def _search(problem: Problem, limits: Limits, aim: str, tokens: float) -> tuple[Found, Hardware]:
    """For time on the whole fleet; for money or energy on as large a part of it as is best."""
    whole = problem.pricer.hardware
    if aim == "time" or whole.count < 2:
        return search(problem, limits), whole
    best: tuple[float, Found, Hardware] | None = None
    error: UserError | None = None
    for share in (1, 2, 4, 8, 16):
        if whole.count // share < 1:
            break
        hardware = whole.with_count(whole.count // share)
        mine = replace(problem, pricer=replace(problem.pricer, hardware=hardware))
        try:
            found = search(mine, replace(limits, spares=limits.spares // share))
        except UserError as problem_found:
            error = problem_found
            continue
        costs = costs_of(hardware, found.choices[0], tokens, problem.tokens, sum(hardware.failures) / 2)
        value = costs.money if aim == "cost" and hardware.usd_per_hour else costs.energy
        if best is None or value < best[0]:
            best = (value, found, hardware)
    if best is None:
        assert error is not None
        raise error
    return best[1], best[2]


def costs_of(hardware: Hardware, choice: Choice, tokens: float, step_tokens: float, rate: float) -> Costs:
    share = goodput(hardware, choice.ranks, rate)
    seconds = tokens / step_tokens * choice.seconds / share.share
    megawatts = hardware.watts * hardware.count * hardware.pue / 1e6
    hours = seconds / 3600
    return Costs(
        goodput=share,
        days=seconds / DAY,
        energy=megawatts * 1e3 * hours,
        power=megawatts,
        money=hours * hardware.usd_per_hour * hardware.count,
    )


def _binding(found: Found, problem: Problem) -> str:
    """What keeps the winner from being quicker."""
    best = found.choices[0]
    lost = losses(best, problem.arch, problem.seq_len)
    largest = max(lost, key=lambda name: lost[name])
    words = f"{largest} ({lost[largest]:.0f}% of a step)"
    other, there = found.unbound, problem.pricer.hardware.accelerator.memory
    most = max(there, *(accelerator(name).memory for name in accelerator_names()))
    if other.seconds < 0.98 * best.seconds and there < other.reserved < FAR_BEYOND * most:
        gain = 100 * (1 - other.seconds / best.seconds)
        return (
            f"memory: {memory(there)} a rank keep out {_differing(other, best)}, which needs "
            f"{memory(other.reserved)} and would save {gain:.0f}% of a step; most is lost to {words}"
        )
    return words


def _differing(other: Choice, best: Choice) -> str:
    """What another layout has that the best has not, in words."""
    row = {**other.row, "recompute_layers": other.row["recompute_layers"] or "all"}
    fields = [*FIELDS, *(["recompute_layers"] if row["recompute"] != "none" else []), "compile"]
    names = [name for name in fields if other.row[name] != best.row[name]]
    return " ".join(f"{name}={str(row[name]).lower()}" for name in names)


def _runner_up(found: Found) -> str:
    """Why the second layout lost."""
    if len(found.choices) < 2:
        return "no other layout fits"
    best, second = found.choices[:2]
    more = {name: second.parts[name] - best.parts.get(name, 0.0) for name in second.parts}
    worst = max(more, key=lambda name: more[name])
    slower = 100 * (second.seconds / best.seconds - 1)
    return f"{second.name}: {slower:.1f}% slower; {span(more[worst])} more for {worst}"


def nearest_published(arch: Architecture, hardware: Hardware) -> str:
    """The measured run that is nearest by active weights, accelerator and number."""
    active = num_active(arch) / 1e9

    def distance(run: Mapping[str, Any]) -> float:
        other = 0.0 if run["accelerator"] == hardware.accelerator.name else 1.0
        return (
            other
            + abs(math.log(run["active_B"] / active))
            + 0.3 * abs(math.log(run["count"] / hardware.count))
        )

    run = min(table("runs")["run"], key=distance)
    words = f"{run['name']}: {run['tokens_per_gpu']:,} tokens/s a GPU, MFU {100 * run['mfu']:.0f}% "
    words += f"({run['source']})"
    ratio = run["active_B"] / active
    far = not 1 / PUBLISHED_REACH < ratio < PUBLISHED_REACH or run["accelerator"] != hardware.accelerator.name
    return words + (" - far from this plan" if far else "")


def size_words(arch: Architecture) -> str:
    total, active = num_parameters(arch), num_active(arch)
    words = f"{count(total)} weights"
    return words if active == total or arch.experts is None else f"{words}, {count(active)} active"
