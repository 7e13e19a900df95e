"""A job that begins with the weights of another model follows its architecture and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from colossus.architecture import Architecture
from colossus.checkpoints.weights import Weights
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.generation.load import open_weights
from colossus.job import Job
from colossus.models.hf.elsewhere import folders_beside, remedy
from colossus.section import Section

# Of the rate that a model from scratch would get: published recipes for tuning take a tenth to a thirtieth of
# the rate of pretraining (Llama 2: 3e-4 and 2e-5; Touvron et al. 2023, arXiv 2307.09288).
TUNING = 0.1
OF_TRAINING = ("balance_loss", "balance_over", "bias_rate", "z_loss")  # of the experts
FREE = ("preset", "init_from", "family", "initializer_range", "init_scheme", "base_width")


def follow_model(job: Job) -> Job:
    """The job with the architecture and the tokenizer of `model.init_from`, where that is given.

    Raises:
        UserError: there is no such model, or the job asks for something else than it is.
    """
    if job.model.init_from is None:
        return job
    weights = _opened(job.model.init_from)
    job = _follow_architecture(job, weights.arch)
    return _follow_tokenizer(job, weights.tokenizer)


def _opened(name: str) -> Weights:
    """The weights that `model.init_from` names, in whose words the error is where there are none."""
    path, field = Path(name), f"model.init_from={name}"
    if not os.path.isdir(path):  # noqa: PTH112  # False too for a name that no folder can have
        allowed = "the folder of a run, of a checkpoint or of a Hugging Face model"
        what = "a file, not a folder" if os.path.exists(path) else "no such folder"  # noqa: PTH110
        raise UserError.field(
            "model.init_from", name, f"{what}; {allowed}{remedy(path)}", folders_beside(path)
        )
    try:
        return open_weights(path)
    except UserError as error:
        raise UserError(f"{field}: {str(error).removeprefix(f'{name}: ').removeprefix(f'{name} ')}") from None


def _follow_architecture(job: Job, arch: Architecture) -> Job:
    values = {}
    for name in Architecture.model_fields:
        asked, there = getattr(job.model, name), getattr(arch, name)
        if name in FREE:
            continue
        if not job.asked_for(f"model.{name}"):
            values[f"model.{name}"] = there
        elif _of_weights(asked) != _of_weights(there):
            raise UserError(
                f"model.{name}={_said(asked)}: model.init_from={job.model.init_from} has {_said(there)}; "
                "leave it out, or begin without init_from"
            )
    defaults = {f"model.{name}": field.default for name, field in Architecture.model_fields.items()}
    kept = {name: value for name, value in values.items() if value != defaults[name]}
    kept["model.family"] = arch.family
    if arch.initializer_range is not None and job.model.initializer_range is None:
        kept["model.initializer_range"] = arch.initializer_range
    plain = {n: v.model_dump() if isinstance(v, Section) else v for n, v in kept.items()}
    return job.put(plain, "derived")


def _of_weights(value: Any) -> Any:
    """What of a field the weights depend on, comparable."""
    if not isinstance(value, Section):
        return value
    return {name: leaf for name, leaf in value.model_dump().items() if name not in OF_TRAINING}


def _said(value: Any) -> str:
    return str(value.model_dump(exclude_defaults=True)) if isinstance(value, Section) else f"{value}"


def _follow_tokenizer(job: Job, folder: Path) -> Job:
    tokenizer = load_tokenizer(folder)
    name = "bytes" if isinstance(tokenizer, BytesTokenizer) else str(folder)
    asked = job.data.tokenizer
    if asked is None:
        return job.derive(**{"data.tokenizer": name})
    if asked != name and (
        asked in ("bpe", "bytes") or load_tokenizer(asked).fingerprint != tokenizer.fingerprint
    ):
        raise UserError(
            f"data.tokenizer={asked}: model.init_from={job.model.init_from} has its own; leave it out"
        )
    return job
