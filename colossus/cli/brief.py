"""A job in a few lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from colossus.architecture import num_active, num_parameters
from colossus.job import PREDICTED, Job
from colossus.layout import AXES, Layout
from colossus.section import Section
from colossus.words import clock, count, duration, plural, short, size

FEW_TOKENS, USUAL_TOKENS = 1, 20  # a parameter; Hoffmann et al. 2022 (arXiv 2203.15556) found about 20 best


def brief(job: Job) -> str:
    """What will happen, a line a subject, and what of it was asked for; what isn't known yet is left out."""
    subjects = {
        "model": _model(job),
        "data": _data(job),
        "steps": _steps(job),
        "tokens": _tokens(job),
        "optimizer": _optimizer(job),
        "machine": _machine(job),
        "planned": _planned(job),
        "asked": _asked(job),
    }
    return "\n".join(f"{name:<10}{', '.join(parts)}" for name, parts in subjects.items() if parts)


def _model(job: Job) -> list[str]:
    model = job.model
    parts = [model.preset] if model.preset else []
    if not any(name.startswith("model.") for name in job.missing()):
        parts.append(f"{count(num_parameters(model))} parameters")
        if model.experts is not None:
            parts.append(f"{count(num_active(model))} of them a token")
            parts.append(f"{model.experts.num_experts} experts, {model.experts.per_token} a token")
    return parts + _known(
        (model.num_layers, lambda n: plural(n, "layer")),
        (model.hidden_size, lambda n: f"width {n:,}"),
        (model.vocab_size, lambda n: f"vocabulary {n:,}"),
    )


def _data(job: Job) -> list[str]:
    data = job.data
    return _known(
        (data.corpus, " + ".join),
        (data.tokenizer, lambda t: f"tokenizer {t}"),
        (data.seq_len, lambda n: f"samples of {n:,} tokens"),
        (data.mask_documents or None, lambda _: "each document by itself"),
    )


def _steps(job: Job) -> list[str]:
    run, seq_len = job.run, job.data.seq_len
    batch = run.global_batch
    return _known(
        (run.minutes, lambda m: f"{clock(60 * m)} of training"),
        (run.steps, lambda n: plural(n, "step")),
        (None if run.steps else run.expected_steps, lambda n: f"about {plural(n, 'step')}"),
        (run.tokens, lambda n: f"{count(n)} tokens"),
        (
            batch,
            lambda n: f"{plural(n, 'sample')} a step" + (f" ({n * seq_len:,} tokens)" if seq_len else ""),
        ),
        (run.seed, lambda n: f"seed {n}"),
    )


def _tokens(job: Job) -> list[str]:
    """How much each parameter will see; a model that is far too large for the run is called so. Who goes on
    with weights has learned already: how much, they do not say."""
    run, seq_len = job.run, job.data.seq_len
    if any(name.startswith("model.") for name in job.missing()) or not (run.expected_steps and seq_len):
        return []
    tokens = run.expected_steps * run.global_batch * seq_len
    each = tokens / num_active(job.model)
    if job.model.init_from is not None:
        return [f"about {count(tokens)}"]
    parts = [f"about {count(tokens)}", f"{short(each)} a parameter"]
    if each < FEW_TOKENS:
        parts.append(f"too few to learn much: some {USUAL_TOKENS} a parameter are usual")
    return parts


def _optimizer(job: Job) -> list[str]:
    optimizer = job.optimizer
    muon = optimizer.name == "muon"
    base, width = job.model.base_width, job.model.hidden_size
    scaled_from = base if base != width else None
    return _known(
        (optimizer.name, {"muon": "Muon and AdamW", "adamw": "AdamW"}.get),
        (optimizer.matrix_lr if muon else None, lambda x: f"matrices at {short(x)}"),
        (optimizer.lr, lambda x: f"the rest at {short(x)}" if muon else f"at {short(x)}"),
        (scaled_from, lambda n: f"scaled from width {n}"),
        (optimizer.schedule, str),
        (optimizer.warmup_steps, lambda n: f"{plural(n, 'step')} of warm-up"),
    )


def _machine(job: Job) -> list[str]:
    layout = job.layout
    return _known(
        (job.fleet.device, str),
        (job.precision.type, str),
        (layout.num_ranks if layout.num_ranks > 1 else None, lambda n: plural(n, "rank") + _spread(layout)),
        (job.run.threads, lambda n: plural(n, "thread")),
        (layout.micro_batch, lambda n: f"{plural(n, 'sample')} at once"),
        (layout.compile, lambda c: "compiled" if c else "not compiled"),
        (layout.recompute if layout.recompute != "none" else None, lambda _: "activations recomputed"),
    )


def _planned(job: Job) -> list[str]:
    """What the planner predicts of the layout that it chose."""
    if PREDICTED[0] not in job.made:
        return []
    seconds, memory = (float(job.made[name]) for name in PREDICTED)
    return ["the layout", f"predicted {duration(seconds)} a step", f"{size(memory)} on a rank"]


def _spread(layout: Layout) -> str:
    """What the axes of a layout are, where it has more than dp_shard."""
    axes = {axis: getattr(layout, axis) or 1 for axis in (*AXES, "ep", "etp")}
    if axes["dp_shard"] == layout.num_ranks and axes["ep"] == 1:
        return ""
    product = " x ".join(f"{axis} {axes[axis]}" for axis in AXES if axes[axis] > 1)
    parts = [product, *(f"{axis} {axes[axis]}" for axis in ("ep", "etp") if axes[axis] > 1)]
    return f" ({', '.join(parts)})" + (f" by {layout.schedule}" if axes["pp"] > 1 else "")


def _asked(job: Job) -> list[str]:
    names = sorted(name for name, origin in job.origins.items() if origin in ("argument", "file"))
    asked = [f"{name}={_short(job.get(name))}" for name in names if not name.endswith(".preset")]
    sections = (s for s in ("model", "layout", "fleet") if getattr(job, s).preset)
    presets = [f"{s}={getattr(job, s).preset}" for s in sections]
    return [*presets, *asked]


def _known(*pairs: tuple[Any, Any]) -> list[str]:
    """The words of each value that is not None."""
    return [words(value) for value, words in pairs if value is not None]


def _short(value: Any) -> str:
    if isinstance(value, Section):
        given = value.model_dump(exclude_unset=True)
        return "{" + ",".join(f"{name}:{_short(leaf)}" for name, leaf in given.items()) + "}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "[" + ",".join(map(_short, value)) + "]"
    return str(value)
