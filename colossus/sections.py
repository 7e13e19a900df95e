"""The sections of a job, but for the two with files of their own: `model` (architecture) and `layout`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from colossus.section import Name, Section, derived


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, float)) else value


def _from_step_0(changes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    steps = {step for step, _ in changes}
    if 0 not in steps or len(steps) < len(changes):
        raise ValueError("must be pairs of (from step, sequences), each step once, the first from step 0")
    return changes


def _one_above_0(weights: list[float]) -> list[float]:
    if not any(weights):
        raise ValueError("must be numbers of at least 0, one above 0")
    return weights


def _intervals(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if any(stop <= first for first, stop in pairs):
        raise ValueError("must be pairs of (first sample, the one after the last)")
    return pairs


Names = Annotated[list[Name], BeforeValidator(_as_list), Field(min_length=1)]
Weights = Annotated[
    list[Annotated[float, Field(ge=0, le=10**9)]],
    BeforeValidator(_as_list),
    Field(min_length=1),
    AfterValidator(_one_above_0),
]
Pair = tuple[Annotated[int, Field(ge=0, le=10**16)], Annotated[int, Field(ge=1, le=10**16)]]


class PhaseChange(Section):
    """From step `from_step` on, samples have another length or come with other weights."""

    from_step: int = Field(ge=0, le=10**9)
    seq_len: int | None = derived(ge=2, le=10**8)
    weights: Weights | None = None


def _each_step_once(phases: list[PhaseChange]) -> list[PhaseChange]:
    if len({phase.from_step for phase in phases}) < len(phases):
        raise ValueError("must be phases from different steps, each from_step once")
    return phases


class Data(Section):
    """What is learned from. A corpus is `python`, a path, `hf:NAME` or `package.module:Name`."""

    corpus: Names = derived()
    weights: Weights = derived()
    tokenizer: Name = derived()  # "bpe", "bytes" or the path of a tokenizer.json
    text_field: Name = derived()
    seq_len: int = derived(ge=2, le=10**8)  # tokens of a sample
    mask_documents: bool = derived()  # attention stays inside a document
    validation_fraction: float = derived(gt=0, lt=1)
    folder: Name = derived()  # where the token shards lie
    phases: Annotated[list[PhaseChange], AfterValidator(_each_step_once)] = derived()
    skip: Annotated[list[Pair], AfterValidator(_intervals)] = (
        derived()
    )  # half-open intervals of samples never trained on


class Optimizer(Section):
    """How weights follow gradients. Rates are per step, at the top of the schedule."""

    name: Literal["adamw", "muon"] = derived()
    lr: float = derived(gt=0, le=10)
    matrix_lr: float = derived(gt=0, le=10)  # Muon's, for the matrices of the layers
    weight_decay: float = derived(ge=0, le=10)
    beta1: float = derived(ge=0, lt=1)
    beta2: float = derived(ge=0, lt=1)
    eps: float = derived(gt=0, lt=1)
    momentum: float = derived(ge=0, lt=1)  # Muon's
    grad_clip: float = derived(gt=0, le=10**9)
    z_loss: float = derived(ge=0, le=10**3)
    schedule: Literal["wsd", "cosine"] = derived()
    warmup_steps: int = derived(ge=0, le=10**9)
    decay_fraction: float = derived(ge=0, le=1)  # of all steps, for wsd
    final_lr_fraction: float = derived(ge=0, le=1)


class Precision(Section):
    """The type of the matrix products. Weights are kept in fp32; under fp64, by which layouts are compared,
    in fp64."""

    type: Literal["fp32", "bf16", "fp64"] = derived()


class Checkpoint(Section):
    """When the run is saved, and what stays."""

    minutes: float = derived(gt=0, le=10**7)
    steps: int = derived(ge=0, le=10**9)  # 0: by time alone
    keep: int = derived(ge=1, le=10**9)  # the newest so many
    keep_every: int = derived(ge=0, le=10**9)  # every so many steps for good; 0: none


class FleetPool(Section):
    """Accelerators of one kind in a fleet of several."""

    accelerator: Name
    count: int = Field(ge=1, le=10**8)


class Fleet(Section):
    """The machines that a job runs on. What is below `device` is for planning, and may stay open."""

    preset: Name | None = None
    name: Name = derived()
    device: Literal["cpu", "cuda"] = derived()
    accelerator: Name | None = None  # of the catalogue: `colossus plan --hardware`
    count: int | None = Field(default=None, ge=1, le=10**8)  # accelerators
    pools: list[FleetPool] | None = None  # in place of accelerator and count, where there are several kinds
    node: Name | None = None  # the server, of the catalogue
    pod: int | None = Field(default=None, ge=1, le=10**8)  # accelerators that reach each other at full rate
    oversubscription: float | None = Field(default=None, ge=1, le=1000)  # of the network between pods
    failures_low: float | None = Field(default=None, ge=0, le=10**4)  # per 1000 days of a server of 8
    failures_high: float | None = Field(default=None, ge=0, le=10**4)
    restart_minutes: float | None = Field(default=None, ge=0, le=10**4)  # from a failure until steps go on
    save_seconds: float | None = Field(default=None, ge=0, le=10**5)  # that a checkpoint stops training
    repair_hours: float | None = Field(default=None, ge=0, le=10**5)  # until a failed server is back
    check_fit: bool = derived()  # whether ranks on several nodes run dry before they start
    usd_per_hour: float | None = Field(default=None, ge=0, le=10**4)  # of one accelerator
    usd_per_kwh: float | None = Field(default=None, ge=0, le=10**3)
    pue: float | None = Field(default=None, ge=1, le=10)  # power of the site over that of its servers


class RunSection(Section):
    """How long, how much a step, and where. One of minutes, steps, tokens; the rest follows."""

    minutes: float | None = derived(ge=1e-4, le=10**7)
    steps: int | None = derived(ge=1, le=10**9)
    tokens: int | None = derived(ge=1, le=10**16)
    seed: int = derived(ge=0, le=2**62)
    folder: Name = derived()
    global_batch: int = derived(ge=1, le=10**7)  # sequences of a step, over all ranks
    batch_schedule: Annotated[list[Pair], AfterValidator(_from_step_0)] = derived()  # (from step, sequences)
    expected_steps: int = derived(ge=1, le=10**16)  # what the length is likely to give; the clock decides
    threads: int = derived(ge=1, le=4096)
    validate_every: int = derived(ge=0, le=10**9)  # steps; 0: at the end only
    branch_from: Name | None = None  # a run, or RUN@STEP: its checkpoint is what this one goes on from
    recover: bool = True  # goes on by itself where a rank that this machine started has died
    prompt: str = derived()  # what the sample at the end continues
    hooks: Annotated[list[Name], BeforeValidator(_as_list)] = derived()  # each `package.module:Name`
