"""A plan: which layout, how fast, whether it fits, how many days, how much energy, money and loss.

`make_plan` answers for a job; what the job leaves open about its length and batch is said as an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from colossus.architecture import Architecture, num_active, num_parameters
from colossus.errors import UserError
from colossus.hardware.catalogue import table
from colossus.hardware.fleets import Hardware, hardware_of
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.layout import AXES
from colossus.perf.price import Pricer
from colossus.perf.software import OURS
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem
from colossus.planner.formulas import RECOMPUTE
from colossus.planner.goodput import DAY, Goodput, goodput, spare_nodes
from colossus.planner.measured import basis, corrections_for
from colossus.planner.search import Choice, Found, Limits, fixed_of, search

AIMS = ("time", "cost", "energy")
SEQ_LEN = 8192  # tokens of a sample, where neither job nor model says fewer
LEAST_BATCH, LARGE_BATCH = 2**20, 2**22  # tokens of a step; of models with more than LARGE active weights
LARGE = 3e9
TOKENS_A_RANK = 1024  # of a step, on large fleets: Llama 3 405B had 16.8 million on 16,384
TOKENS_A_WEIGHT = 20  # of a whole run, where the job names no length (arXiv 2203.15556)
BAND = (
    0.15  # of a step's seconds: of held-out runs of dense models on Hopper the mean error is 0.11, p90 0.21
)
FIELDS = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep", "etp", "schedule", "stages_per_rank",
          "micro_batch", "recompute", "reshard")  # fmt: skip
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
    basis: what the seconds rest on, and whether that was measured.
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

    @property
    def tokens_per_second(self) -> float:
        return self.global_batch * self.seq_len / self.best.seconds

    def layout(self) -> dict[str, Any]:
        """The winner as values of the `layout` section."""
        values = {name: self.best.row[name] for name in (*FIELDS, "cp_method", "compile")}
        if self.best.pools:
            values["pools"] = [
                {
                    "replicas": p.replicas,
                    "share": p.share,
                    "micro_batch": p.micro_batch,
                    "recompute": p.recompute,
                }
                for p in self.best.pools
            ]
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layout": self.layout(),
            "step_seconds": self.best.seconds,
            "step_seconds_band": [self.best.seconds * (1 - BAND), self.best.seconds * (1 + BAND)],
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
        }


def make_plan(job: Job, machine: Machine | None = None, aim: str = "time", *, whole: bool = False) -> Plan:
    """Plans a job. machine: this one as measured, for a fleet that names no accelerators. whole: all of the
    fleet that is not in reserve must work.

    Raises:
        UserError: the job cannot be planned; NothingFits: no layout is legal and fits.
    """
    if aim not in AIMS:
        raise UserError.field("--for", aim, f"one of {', '.join(AIMS)}", AIMS)
    arch = _arch(job)
    hardware = hardware_of(job.fleet, machine, ranks=_ranks(job))
    here = machine if job.fleet.accelerator is None and job.fleet.pools is None else None
    corrections = corrections_for(hardware, here)
    assumptions = list(hardware.assumptions)
    seq_len = job.data.seq_len or min(arch.max_seq_len or SEQ_LEN, SEQ_LEN)
    precision: str = job.precision.type or ("fp32" if hardware.accelerator.device == "cpu" else "bf16")
    if precision not in ("fp32", "bf16"):  # any float8 recipe
        precision = "fp8"
    spares = _spares(hardware)
    usable = hardware.count - spares
    batch = job.run.global_batch
    if batch is None:
        batch = _batch(usable, seq_len, num_active(arch))
        assumptions.append(f"run.global_batch={batch:,}: {batch * seq_len:,} tokens of a step")
    tokens = _tokens(job, arch, batch * seq_len, assumptions)
    optimizer = job.optimizer.name or "adamw"
    if job.optimizer.name is None:
        assumptions.append("optimizer.name=adamw: what Muon takes beside it is counted where it is asked for")
    problem = Problem(arch, seq_len, batch, precision, Pricer.of(hardware, OURS, corrections), optimizer)
    fixed = fixed_of({name: getattr(job.layout, name) for name in (*FIELDS, "cp_method", "compile")})
    if here is not None and here.device == "cpu" and here.compiler is None:
        fixed["compile"] = False
    found, hardware = _search(problem, Limits(fixed, spares, whole), aim, tokens)
    best = found.choices[0]
    low, high = (costs_of(hardware, best, tokens, batch * seq_len, rate) for rate in hardware.failures)
    part = hardware.accelerator
    assumptions += [
        f"{what} of {part.name}, from parts like it" for what in part.assumed if "fp8" not in what
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
        binding=_binding(found),
        runner_up=_runner_up(found),
        nearest=nearest_published(arch, hardware),
        assumptions=tuple(assumptions),
        basis=tuple(basis(problem, layouts_of_row(best.row))),
        problem=problem,
    )


def layouts_of_row(row: Mapping[str, Any]) -> Layouts:
    """One layout as columns."""
    return Layouts.of(
        [{**row, "recompute": RECOMPUTE[row["recompute"]], "zero": 3.0 if row["reshard"] else 2.0}]
    )


def _ranks(job: Job) -> int:
    """That the layout asks for, where it does; of a processor, which any number of ranks can share."""
    return math.prod(getattr(job.layout, axis) or 1 for axis in AXES)


def _arch(job: Job) -> Architecture:
    arch = job.model
    open_fields = [
        n for n in ("vocab_size", "hidden_size", "num_layers", "num_heads") if getattr(arch, n) is None
    ]
    if open_fields:
        raise UserError(
            f"{', '.join(f'model.{name}' for name in open_fields)}: must be given to plan; or name a preset "
            "(model=llama3.1-8b; colossus models lists them)"
        )
    kv = arch.num_kv_heads or arch.num_heads
    width = arch.head_dim or arch.hidden_size // arch.num_heads
    changes = {
        "num_kv_heads": kv,
        "head_dim": width,
        "intermediate_size": arch.intermediate_size or 4 * arch.hidden_size,
        "max_seq_len": arch.max_seq_len or SEQ_LEN,
        "tie_embeddings": bool(arch.tie_embeddings),
        "qk_norm": bool(arch.qk_norm),
    }
    return arch.model_copy(update=changes)


def _spares(hardware: Hardware) -> int:
    """Accelerators in reserve at the high rate of failures, where there are servers to spare."""
    nodes = hardware.count // hardware.node_size
    failures = nodes * hardware.failures[1] / 1000 / DAY
    waiting = spare_nodes(failures, hardware.repair_seconds)
    return waiting * hardware.node_size if waiting < nodes // 10 and nodes >= 64 else 0


def _batch(ranks: int, seq_len: int, active: int) -> int:
    """Sequences of a step: a million tokens at least, four of a large model, and a thousand a rank."""
    least = LARGE_BATCH if active > LARGE else LEAST_BATCH
    sequences = max(least, ranks * TOKENS_A_RANK) / seq_len
    return max(1, 2 ** round(math.log2(sequences))) if sequences < 2048 else round(sequences / 256) * 256


def _tokens(job: Job, arch: Architecture, step_tokens: int, assumptions: list[str]) -> float:
    if job.run.tokens is not None:
        return float(job.run.tokens)
    if job.run.steps is not None:
        return float(job.run.steps) * step_tokens
    tokens = float(TOKENS_A_WEIGHT * num_active(arch))
    assumptions.append(f"run.tokens={tokens:.3g}: 20 a weight")
    return tokens


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


def _binding(found: Found) -> str:
    """What keeps the winner from being quicker."""
    best = found.choices[0]
    losses = {name: value for name, value in best.parts.items() if name not in ("products",)}
    largest = max(losses, key=lambda name: losses[name])
    words = f"{largest} ({100 * losses[largest] / best.seconds:.0f}% of a step)"
    if found.memory_binds and found.quickest_without_memory < 0.98 * best.seconds:
        gain = 100 * (1 - found.quickest_without_memory / best.seconds)
        return f"memory: with more of it a step would take {gain:.0f}% less; then {words}"
    return words


def _runner_up(found: Found) -> str:
    """Why the second layout lost."""
    if len(found.choices) < 2:
        return "no other layout fits"
    best, second = found.choices[:2]
    more = {name: second.parts[name] - best.parts.get(name, 0.0) for name in second.parts}
    worst = max(more, key=lambda name: more[name])
    slower = 100 * (second.seconds / best.seconds - 1)
    return f"{second.name}: {slower:.1f}% slower; {worst} takes {more[worst]:.3g} s more"


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
    words = f"{_short(total)} weights"
    return words if active == total or arch.experts is None else f"{words}, {_short(active)} active"


def _short(count: float) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
