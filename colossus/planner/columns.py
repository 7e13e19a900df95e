"""Layouts as numpy columns: what the rules of `layout.py` and the formulas read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colossus.layout import AXES, ONE_STAGE, Layout, layout_row
from colossus.planner.formulas import RECOMPUTE

ALL = 2**20  # layers of a stage, where no number says how many of them are recomputed
WHOLE = (*AXES, "ep", "etp", "stages_per_rank", "micro_batch")


@dataclass(frozen=True)
class Layouts:
    """N layouts. See `layout.Layout`; beside its fields:

    zero: what is sharded over dp_shard: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too,
        gathered for each use. Without dp_shard it means nothing.
    sp: 1 where tokens outside the products are spread over tp (the trainer always does).
    recompute: 0 none, 1 selective, 2 full; of the first `recompute_layers` layers of a stage, `ALL` of all.
    """

    columns: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Layouts:
        """From rows with the names of `layout.layout_row`; what one leaves out is the simplest."""
        plain: dict[str, Any] = dict.fromkeys(WHOLE, 1) | {
            "schedule": "1f1b", "cp_method": "gather", "recompute": "none", "zero": 2.0, "sp": 1.0,
            "recompute_layers": ALL, "compile": 0, "async_tp": 0,
        }  # fmt: skip
        columns = {}
        for name, default in plain.items():
            values = [row.get(name, default) for row in rows]
            if name == "recompute":
                values = [RECOMPUTE[value] if isinstance(value, str) else value for value in values]
            elif name == "recompute_layers":
                values = [ALL if value is None else value for value in values]
            columns[name] = np.array(values)
        return cls(columns)

    @classmethod
    def of_layout(cls, layout: Layout) -> Layouts:
        """Of one; open fields count as the simplest."""
        return cls.of([layout_row(layout) | {"recompute_layers": layout.recompute_layers}])

    def __len__(self) -> int:
        return len(self.columns["tp"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def number(self, name: str) -> NDArray[np.float64]:
        return self.columns[name].astype(float)

    def take(self, index: Any) -> Layouts:
        return Layouts({name: column[index] for name, column in self.columns.items()})

    @property
    def ranks(self) -> NDArray[np.float64]:
        ranks = np.ones(len(self))
        for axis in AXES:
            ranks = ranks * self.columns[axis]
        return ranks

    @property
    def dp(self) -> NDArray[np.float64]:
        return self.number("dp_replicate") * self.number("dp_shard")

    def micro_batches(self, global_batch: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Of a rank in a step."""
        return np.ceil(global_batch / (self.dp * self.number("micro_batch")))

    def row(self, i: int) -> dict[str, Any]:
        """One layout as plain values."""
        names = {value: name for name, value in RECOMPUTE.items()}
        row = {name: column[i].item() for name, column in self.columns.items()}
        layers = row["recompute_layers"]
        return row | {
            "recompute": names[int(row["recompute"])],
            "recompute_layers": None if layers >= ALL else layers,
        }

    def with_columns(self, **changed: NDArray[Any]) -> Layouts:
        return Layouts({**self.columns, **changed})

    @classmethod
    def joined(cls, several: Sequence[Layouts]) -> Layouts:
        """One after the other."""
        return cls({name: np.concatenate([one[name] for one in several]) for name in several[0].columns})


def unique_columns(keys: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The different columns of [K, N] numbers, [K, M], and which of them each column is, [N]."""
    codes, size = np.zeros(keys.shape[1], dtype=np.int64), 1
    for row in keys:  # one number for each column: far quicker to sort than columns are
        values, places = np.unique(row, return_inverse=True)
        codes, size = codes * len(values) + places.reshape(-1), size * len(values)
        assert size < 2**62
    _, first, back = np.unique(codes, return_index=True, return_inverse=True)
    return keys[:, first], back.reshape(-1)


def stages(row: Mapping[str, Any]) -> int:
    """Stages of the pipeline of one layout."""
    per_rank = 1 if row["schedule"] in ONE_STAGE else int(row["stages_per_rank"])
    return int(row["pp"]) * per_rank
