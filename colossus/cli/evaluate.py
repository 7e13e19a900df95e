"""`colossus eval`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.files import check_writable, write

if TYPE_CHECKING:
    from colossus.evaluation.corpora import CorpusResult
    from colossus.evaluation.tasks import TaskResult

SCHEMA = 1  # of the JSON


def evaluate(
    path: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="Text to score, may be repeated: python, a path, hf:NAME or package.module:Name. "
            "Without it (and without --tasks): what the run held out.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, the standard harness.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a window.")] = None,
    documents: Annotated[
        int | None, typer.Option(metavar="N", help="Score so many documents of each corpus at most.")
    ] = None,
    megabytes: Annotated[
        float | None,
        typer.Option(metavar="N", help="Score so much text of each corpus at most; 1 of a --corpus."),
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="The field of JSON lines and tables that holds the text.")
    ] = "text",
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where tasks of your own are defined.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(metavar="N", help="Examples before each question of a task.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only so many examples of each task.")
    ] = None,
    type: Annotated[
        str | None, typer.Option(metavar="fp32|bf16", help="Of the products; the quickest here.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures.")] = None,
) -> None:
    """Measure a trained model: loss and bits per byte on text, or tasks of the standard harness."""
    from colossus import api
    from colossus.architecture import num_parameters
    from colossus.evaluation.place import place
    from colossus.words import count, plural

    began = time.perf_counter()
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check(tasks, names, corpus, shots, limit, include_path, as_json)
    model, tokenizer = api.load_model(path)
    loaded = api.load_tasks(names, include_path=include_path, shots=shots) if names else None
    kind, device = place(model, type)
    parameters = count(num_parameters(model.arch))
    print(f"{path}: {parameters} parameters, on {device} in {kind}", flush=True)

    bounds: dict[str, Any] = {"seq_len": seq_len, "documents": documents, "megabytes": megabytes}
    scored = [api.evaluate(model, tokenizer, name, text_field=text_field, **bounds) for name in corpus or ()]
    if not corpus and not names:
        scored.append(api.evaluate(model, tokenizer, held_out_of=path, **bounds))
    if scored:
        print("\n".join(["", *_of_corpora(scored)]))
    results: list[TaskResult] = []
    if loaded is not None:
        quiet = not sys.stderr.isatty()
        results = api.evaluate_tasks(model, tokenizer, loaded, limit=limit, seq_len=seq_len, quiet=quiet)
        print("\n".join(["", *_of_tasks(results)]))
        if limit is not None:
            print(f"Only the first {plural(limit, 'example')} of each task: not to be compared.")
    if as_json is not None:
        report = {
            "schema": SCHEMA,
            "path": str(path),
            "num_parameters": num_parameters(model.arch),
            "type": kind,
            "device": device,
            "corpora": [result.to_dict() for result in scored],
            "tasks": [result.to_dict() for result in results],
            "limit": limit,
            "versions": _versions(bool(results)),
            "seconds": round(time.perf_counter() - began, 3),
        }
        write(as_json, json.dumps(report, indent=1) + "\n")


def _check(
    tasks: str | None,
    names: list[str],
    corpora: list[str] | None,
    shots: int | None,
    limit: int | None,
    include_path: Path | None,
    as_json: Path | None,
) -> None:
    """What can be told before a model is opened."""
    from colossus.data.open import check_corpus
    from colossus.errors import UserError

    if tasks is not None and not names:
        raise UserError("--tasks: names no task")
    given = {"--shots": shots, "--limit": limit, "--include-path": include_path}
    if not names and (idle := [option for option, value in given.items() if value is not None]):
        raise UserError(f"{idle[0]}: is for tasks; name some: --tasks NAME,...")
    for corpus in corpora or ():
        check_corpus(corpus)
    check_writable("--json", as_json)


def _of_corpora(results: list[CorpusResult]) -> list[str]:
    from colossus.data.compressors import COMPRESSORS, have_work
    from colossus.data.lossless import LIMIT
    from colossus.words import count, percent, size

    head = ["corpus", "documents", "text", "window", "loss", "bits/byte", *COMPRESSORS.values()]
    rows = []
    for found in results:
        r = found.result
        others = [r.gzip_bits_per_byte, r.bz2_bits_per_byte, r.xz_bits_per_byte]
        shown = [f"{value:.3f}" if have_work(r.num_documents, r.num_bytes) else "-" for value in others]
        which = count(r.num_documents) + ("" if found.whole else ", a part")
        own = "none" if r.bits_per_byte is None else f"{r.bits_per_byte:.3f}"
        figures = [f"{r.loss:.4f}", own, *shown]
        rows.append([found.corpus, which, size(r.num_bytes), f"{found.seq_len:,}", *figures])
    said = ["Loss in nats a token; bits to store a byte of the text, less is better."]
    for found in results:
        if found.result.lost:
            none = ", so that its bits per byte would say nothing" if found.result.lost >= LIMIT else ""
            said.append(
                f"{found.corpus}: the tokenizer loses {percent(found.result.lost)} of the text{none}."
            )
    return [*_table(head, rows), *said]


def _of_tasks(results: list[TaskResult]) -> list[str]:
    rows = []
    for found in results:
        name = [found.task, "" if found.num_examples is None else f"{found.num_examples:,}"]
        name.append("" if found.shots is None else str(found.shots))
        for metric, value in found.metrics.items():
            error = found.errors.get(metric)
            rows.append([*name, metric, f"{value:.4f}", "" if error is None else f"± {error:.4f}"])
            name = ["", "", ""]
    return _table(["task", "examples", "shots", "metric", "value", ""], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of a common width, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _versions(harness: bool) -> dict[str, str]:
    from importlib.metadata import version

    import torch

    from colossus import __version__

    found = {"colossus": __version__, "torch": str(torch.__version__)}
    return found | {"lm_eval": version("lm_eval")} if harness else found
