"""Whether every family computes what its published implementation computes: tiny models, all parts of them.

Each is made and saved by `transformers` with random weights that all matter, and loaded by us through the
mapping: the largest difference of a logit and of a tensor's gradient (by norm), in fp32, over several shapes
and lengths, beyond windows and beyond the length that positions were stretched from; and whether importing
and exporting gives every tensor back bit for bit. Grok-1 and Grok-2, which `transformers` lacks, are read
from small checkpoints in xAI's published forms, and their logits compared with float64 references.

    python -m benchmarks.families [--quick] [--out FILE] [--seeds N]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from colossus.measure.machine import this_machine
from colossus.models.hf.published import fitting_family, open_published, publish
from colossus.models.hf.writing import write_checkpoint
from colossus.perf.receipts import Figure, write_receipt
from tests.models.hf import groks, tiny

SHAPES = ((3, 1), (1, 6), (2, 37))  # sequences, tokens
SEEDS = 8
VOCABULARY = 37  # of the small Groks


@dataclass
class Row:
    """The worst over all seeds. logits: of about 1. gradients: relative, by norm. changed: tensors. The last
    two are None where there is no implementation that has them."""

    logits: float = 0.0
    gradients: float | None = None
    changed: int | None = None

    def add(self, logits: float, gradients: float, changed: int) -> None:
        self.logits, self.gradients = max(self.logits, logits), max(self.gradients or 0.0, gradients)
        self.changed = (self.changed or 0) + changed


def against_transformers(name: str, seeds: int) -> Row:
    row = Row()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as place:
            theirs = tiny.make(name, seed)
            folder = tiny.save(theirs, Path(place) / "published")
            ours = tiny.load(folder)
            logits = 0.0
            with torch.no_grad():
                for shape in SHAPES:
                    given = tiny.tokens(*shape)
                    logits = max(logits, float((theirs(given).logits - ours(given)).abs().max()))
            differences = tiny.gradient_differences(
                theirs, ours, tiny.tokens(*SHAPES[-1]), Path(place) / "gradients"
            )
            row.add(logits, max(differences.values()), changed_tensors(folder, Path(place) / "again"))
    return row


def changed_tensors(folder: Path, again: Path) -> int:
    """Tensors that are not bit for bit the same after importing and exporting."""
    opened = open_published(folder)
    _, tensors = publish(opened.arch, fitting_family(opened.arch), opened.tensors)
    write_checkpoint(again, tensors)
    before, after = (load_file(path / "model.safetensors") for path in (folder, again))
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    return len((before.keys() | after.keys()) - same)


def rows_of(seeds: int) -> dict[str, Row]:
    rows = {name: against_transformers(name, seeds) for name in tiny.MODELS}
    for name, compare in {"grok1": groks.grok1_difference, "grok2": groks.grok2_difference}.items():
        rows[name] = Row(max(against_reference(compare, seed) for seed in range(seeds)))
    return rows


def against_reference(compare: Callable[..., float], seed: int) -> float:
    """The largest difference of a logit over all shapes."""
    found = []
    for batch, length in SHAPES:
        with tempfile.TemporaryDirectory() as place:
            drawn_BT = groks.tokens(batch, length, VOCABULARY, seed)
            found.append(compare(Path(place), seed, torch.float32, drawn_BT))
    return max(found)


def figures_of(rows: dict[str, Row]) -> list[Figure]:
    figures = []
    for name, row in rows.items():
        figures.append(Figure(f"{name}: logits differ by at most", row.logits, "", "1e-4"))
        if row.gradients is not None and row.changed is not None:
            gradient = f"{name}: a tensor's gradient differs by at most"
            figures.append(Figure(gradient, row.gradients, "of its norm", "1e-4"))
            figures.append(Figure(f"{name}: changed by import and export", row.changed, "tensors", "0"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one shape of each family")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="shapes of each family")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = rows_of(1 if arguments.quick else arguments.seeds)
    print_table(rows)
    figures = figures_of(rows)
    write_receipt("families", figures, arguments.out, hardware=this_machine().to_dict())


def print_table(rows: dict[str, Row]) -> None:
    print(f"{'family':<20}{'logits':>12}{'gradients':>12}{'changed':>10}")
    for name, row in rows.items():
        gradients = "" if row.gradients is None else f"{row.gradients:.1e}"
        changed = "" if row.changed is None else f"{row.changed}"
        print(f"{name:<20}{row.logits:>12.1e}{gradients:>12}{changed:>10}")


if __name__ == "__main__":
    main()
