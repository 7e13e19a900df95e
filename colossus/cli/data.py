"""`colossus data build` and `colossus data show`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colossus.cli.words import Words, split

if TYPE_CHECKING:
    from colossus.data.show import Row
    from colossus.job import Job


def app() -> typer.Typer:
    """The verbs below `data`."""
    verbs = typer.Typer(help="Build token shards from text; show what a training step will see.")
    verbs.command("build")(build)
    verbs.command("show")(show)
    return verbs


def build(
    words: Words = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, and compare checksums.")] = False,
) -> None:
    """Build token shards from text, as training would at its start.

    A build that was killed goes on with what it had finished; shards that are whole are kept.
    """
    from colossus import api
    from colossus.cli.progress import BuildProgress
    from colossus.data.build import verify as verify_shards
    from colossus.data.prepare import prepare_data
    from colossus.words import size

    job = _with_data(api.load_job(*split(words)))
    with BuildProgress(sys.stdout) as progress:
        job = prepare_data(job, progress.show)
    folder = Path(job.data.folder)
    if verify:
        with BuildProgress(sys.stdout) as progress:
            num_bytes = verify_shards(folder, len(job.data.corpus), progress.show)
    print("\n".join(_report(folder, job)))
    if verify:
        print(f"{'verified':<10}every byte of {size(num_bytes)} is as it was built")


def show(
    words: Words = None,
    step: Annotated[int, typer.Option(min=0, help="The step of training.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Show so many of its samples.")] = 4,
) -> None:
    """Show what a training step will see, decoded: its samples, their origin, the borders of documents.

    What the model sees without learning it is dim, or in ⟪ ⟫ where the output is no terminal.
    """
    from rich.console import Console

    from colossus import api
    from colossus.cli.progress import BuildProgress
    from colossus.data.order import BatchSchedule
    from colossus.data.prepare import is_prepared, prepare_data
    from colossus.data.show import rows_of_step
    from colossus.data.sources import TrainingData
    from colossus.words import plural

    path, overrides = split(words)
    job = api.resolve(api.load_job(path, overrides))
    if not (path is not None and path.is_dir() and is_prepared(job)):  # a run keeps to the shards it has
        with BuildProgress(sys.stdout) as progress:
            job = prepare_data(job, progress.show)
    schedule = BatchSchedule(job.run.batch_schedule)
    data = TrainingData.open(job, schedule)
    batch = schedule.batch(step)
    seq_len = data.order.phase(schedule.first_sample(step)).seq_len
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"step {step:,}: {plural(batch, 'sample')} of {seq_len:,} tokens", style="bold")
    for row in rows_of_step(data, schedule, step, min(rows, batch), job.data.mask_documents):
        console.print(f"\n{_heading(row, job)}", style="bold cyan", markup=False)
        _print_row(console, row)
    if rows < batch:
        console.print(f"\nand {plural(batch - rows, 'more sample')}: --rows {batch}")


def _with_data(job: Job) -> Job:
    """The job with all that building its data needs; a model that is not chosen yet can wait."""
    from colossus.derive.dial import vocabulary
    from colossus.derive.model import derive_data, follow_model

    job = derive_data(follow_model(job))
    return job.derive(**{"model.vocab_size": vocabulary(job)})


def _report(folder: Path, job: Job) -> list[str]:
    """What was built, a line a subject."""
    from colossus.data.build import open_split
    from colossus.data.tokenizer import load_tokenizer
    from colossus.words import count, percent, plural, size

    tokenizer = load_tokenizer(folder / "tokenizer")
    lines = [
        ("shards", str(folder)),
        ("tokenizer", f"{job.data.tokenizer}, {count(tokenizer.vocab_size)} tokens"),
    ]
    for index, name in enumerate(job.data.corpus):
        train, held_out = open_split(folder, index, "train"), open_split(folder, index, "validation")
        num_bytes = train.num_bytes + held_out.num_bytes
        num_tokens = train.num_tokens + held_out.num_tokens
        learned = train.num_learned / train.num_tokens
        share = f" ({percent(learned)} of them learned)" if learned < 1 else ""
        lines += [
            ("corpus", name),
            *(("", note) for note in train.manifest["corpus"]["notes"]),
            (
                "learned",
                f"{plural(train.num_documents, 'document')}, {size(train.num_bytes)} of text, "
                f"{count(train.num_tokens)} tokens{share}, {num_bytes / num_tokens:.2f} bytes a token",
            ),
            (
                "held out",
                f"{plural(held_out.num_documents, 'document')}, {size(held_out.num_bytes)} of text "
                f"({percent(held_out.num_bytes / num_bytes)})",
            ),
        ]
    return [f"{subject:<10}{text}" for subject, text in lines]


def _heading(row: Row, job: Job) -> str:
    name = job.data.corpus[row.corpus]
    learned = (
        f"{row.num_targets:,} targets" if row.num_targets < row.num_tokens else "every next token learned"
    )
    return f"sample {row.sample:,}: {name}, epoch {row.epoch}, window {row.window:,}; {learned}"


def _print_row(console: object, row: Row) -> None:
    from rich.console import Console
    from rich.text import Text

    assert isinstance(console, Console)
    line = Text()
    for piece in row.pieces:
        if piece.begins_document:
            line.append(f"{'' if not line else chr(10)}── document ──\n", style="magenta")
        if piece.is_learned:
            line.append(piece.text)
        elif console.is_terminal:
            line.append(piece.text, style="dim")
        elif piece.text:
            line.append(f"⟪{piece.text}⟫")
    console.print(line)
