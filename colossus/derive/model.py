"""The one place that fills in what is learned from and what is trained: of every verb that takes a job.

Nothing here needs PyTorch, so that `plan` means the model that `train` trains.
"""

from __future__ import annotations

from collections.abc import Callable

from colossus import architecture
from colossus.architecture import Architecture, num_active
from colossus.derive.dial import Plan, base_width_for, compute_of_length, dial, longest_sample
from colossus.errors import UserError
from colossus.job import Job
from colossus.perf.flops import model_flops_per_token
from colossus.planner.plan import TOKENS_A_WEIGHT

# Short runs learn more from short samples: on 1e13 FLOPs a model of width 96 ended at 1.35 bits per byte with
# samples of 256 tokens, at 1.61 with 512 (one seed each: the step at which a small model learns to copy, and
# its loss falls at once, differs by seed).
SEQ_LEN = {"cpu": 256, "cuda": 1024}
MADE_FOR = 8192  # up to so many tokens a GPU takes samples as long as a model says that it is for


def follow_model(job: Job) -> Job:
    """The job with the architecture and the tokenizer of `model.init_from`, where that is given; only that
    needs PyTorch. Raises as `origin.follow_model` does."""
    if job.model.init_from is None:
        return job
    from colossus.derive.origin import follow_model

    return follow_model(job)


def derive_data(job: Job) -> Job:
    """What is learned from, and in samples of what length."""
    job = job.derive(
        **{
            "data.corpus": ["python"],
            "data.tokenizer": "bpe",
            "data.text_field": "text",
            "data.mask_documents": False,
            "data.validation_fraction": 0.02,
            "data.phases": [],
            "data.skip": [],
        }
    )
    job = job.derive(**{"data.weights": [1.0] * len(job.data.corpus)})
    if len(job.data.weights) != len(job.data.corpus):
        raise UserError(
            f"data.weights={job.data.weights}: {len(job.data.weights)}, and {len(job.data.corpus)} in "
            f"data.corpus={job.data.corpus}; one for each"
        )
    for phase in job.data.phases:
        if phase.weights is not None and len(phase.weights) != len(job.data.corpus):
            raise UserError(
                f"data.phases from_step={phase.from_step}: weights={phase.weights}: {len(phase.weights)}, "
                f"and {len(job.data.corpus)} in data.corpus={job.data.corpus}; one for each"
            )
    return job.derive(**{"data.seq_len": _seq_len(job.fleet.device or "cpu", job.model.max_seq_len)})


def _seq_len(device: str, max_seq_len: int | None) -> int:
    """Tokens of a sample, where nobody says."""
    most = MADE_FOR if device == "cuda" and max_seq_len is not None else SEQ_LEN[device]
    return min(most, max_seq_len or most)


def default_optimizer(job: Job) -> str:
    """Muon for a model from scratch; weights that AdamW made are tuned by AdamW."""
    return "muon" if job.model.init_from is None else "adamw"


def derive_model(
    job: Job,
    compute_of: Callable[[Architecture], float],
    fits: Callable[[Architecture], bool] = lambda _: True,
) -> tuple[Job, Plan]:
    """The job, its data derived, with every field of its model; and what the dial says of the run.

    compute_of, fits: see `dial`.

    Raises:
        UserError: what was asked for of the model does not fit together.
    """
    plan = dial(job, compute_of, fits)
    return _with_architecture(_derive_base_width(job, plan), plan.arch), plan


def model_by_length(
    job: Job, device: str = "cuda", flops_per_second: float | None = None
) -> tuple[Job, Plan]:
    """The job with its data and its model filled in without a machine to time: a model that is not asked for
    follows from `run.tokens` or `run.steps` alone.

    device: of a fleet that says none. flops_per_second: model FLOPs by which `run.minutes` count, about.

    Raises:
        UserError: there is no length to choose a model by, or what was asked for does not fit together.
    """
    job = follow_model(job)
    job = derive_data(job.derive(**{"fleet.device": device}))
    has_length = job.run.tokens is not None or job.run.steps is not None
    if job.model.hidden_size is None and not has_length:
        raise UserError(
            "model.hidden_size: must be given to plan for another machine, or run.tokens, which chooses a "
            "model; or name a preset (model=llama3.1-8b; colossus models lists them)"
        )

    def compute_of(arch: Architecture) -> float:
        architecture.check(arch)
        flops = model_flops_per_token(arch, job.data.seq_len)
        if has_length:
            return compute_of_length(job, flops)
        if job.run.minutes is not None and flops_per_second is not None:
            return 60 * job.run.minutes * flops_per_second
        return TOKENS_A_WEIGHT * num_active(arch) * flops

    return derive_model(job, compute_of)


def _derive_base_width(job: Job, plan: Plan) -> Job:
    """Where the rates hold as they are: a model that the dial chose, one that is tuned, whose rate follows
    from its own size, and rates that were asked for, are not scaled."""
    asked = job.optimizer.lr is not None or job.optimizer.matrix_lr is not None
    if asked or job.model.hidden_size is None or job.model.init_from is not None:
        return job.derive(**{"model.base_width": plan.arch.hidden_size})
    return job.derive(**{"model.base_width": base_width_for(job, plan.arch, plan.compute)})


def _with_architecture(job: Job, arch: Architecture) -> Job:
    values = arch.model_dump(exclude_none=True, exclude={"rope_scaling"})
    if arch.experts is not None:  # what was left out of the table that was asked for
        table = arch.experts.model_dump(exclude_none=True, exclude_unset=True)
        job = job.put({"model.experts": table}, job.origins.get("model.experts", "derived"))
    job = job.derive(**{f"model.{name}": v for name, v in values.items() if name not in ("preset", "family")})
    longest, most = longest_sample(job), job.model.max_seq_len
    if longest > most:
        where = "data.seq_len" if longest == job.data.seq_len else "data.phases seq_len"
        raise UserError(f"{where}={longest}: longer than model.max_seq_len={most}; at most {most}")
    architecture.check(job.model)
    return job
