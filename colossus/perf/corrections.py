"""What was measured over what the formulas say, by shape: near a measured shape a price is the measured one.

A formula knows the trend, and single shapes differ from it: by tiles, caches, and which kernel a library
picks. Ratios are interpolated in octaves of the shape, by inverse squared distance, so that at a measured
shape the price is what was measured, and far from all of them it is the formula times the mean ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from colossus.perf.ledger import Columns

Key = tuple[str, str, str, str]  # kind, variant, precision, phase
NEIGHBOURS = 6
FEW = 512  # points that are looked up as they are; of more, equal ones once
SOFT = 0.02  # squared octaves: nearer than that is the same shape
SAME, NEAR = 0.3, 1.5  # octaves to a measured shape: a price is that one's; between them; and beyond


@dataclass(frozen=True)
class Surface:
    """Ratios at points: [S, D] in octaves, [S] in octaves."""

    points: NDArray[np.float64]
    ratios: NDArray[np.float64]

    def at(self, points: NDArray[np.float64]) -> tuple[Columns, Columns]:
        """Ratio and distance in octaves to the nearest measured shape, of points [P, D]. What is larger than
        all that was measured is as good as the largest: rates no longer change."""
        points = np.minimum(points, self.points.max(axis=0))
        unique, back = points, np.arange(len(points))
        if len(points) > FEW:
            unique, back = np.unique(np.round(points, 3), axis=0, return_inverse=True)
        squared = ((unique[:, None, :] - self.points[None]) ** 2).sum(-1)
        few = min(NEIGHBOURS, len(self.ratios))
        nearest = np.argpartition(squared, few - 1, axis=1)[:, :few]
        distances = np.take_along_axis(squared, nearest, axis=1)
        weights = 1 / (distances + SOFT) ** 2
        ratios = (weights * self.ratios[nearest]).sum(1) / weights.sum(1)
        back = back.reshape(-1)
        return 2.0 ** ratios[back], np.sqrt(distances.min(1))[back]


@dataclass(frozen=True)
class Corrections:
    """Surfaces by kind of work. source: what was measured, and when.

    held: see `hardware.calibration.Calibration`; None: it is of a machine like this one, not of this one.
    best: by type, FLOP/s of the quickest product that was timed.
    """

    surfaces: Mapping[Key, Surface]
    held: float | None = None
    source: str = ""
    best: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ratios: Mapping[Key, Sequence[tuple[tuple[float, ...], float]]],
        held: float | None = None,
        source: str = "",
        best: Mapping[str, float] | None = None,
    ) -> Corrections:
        """From (shape, measured over formula) by key."""
        surfaces = {
            key: Surface(np.log2(np.array([s for s, _ in rows], dtype=float)), np.log2([r for _, r in rows]))
            for key, rows in ratios.items()
        }
        return cls(surfaces, held, source, best or {})

    def has(self, key: Key) -> bool:
        """Whether anything like it was measured."""
        return self._find(key) is not None

    def _find(self, key: Key) -> Surface | None:
        """Of the key itself, else of its kind for any phase."""
        kind, variant, precision, _ = key
        return self.surfaces.get(key) or self.surfaces.get((kind, variant, precision, ""))

    def ratio(self, key: Key, *shape: Columns) -> Columns:
        """Measured over formula, of the shapes that the columns say; see `has`."""
        return self.ratio_and_distance(key, *shape)[0]

    def ratio_and_distance(self, key: Key, *shape: Columns) -> tuple[Columns, Columns]:
        """Also the octaves to the nearest measured shape."""
        surface = self._find(key)
        assert surface is not None, f"{key} was not measured"
        columns = np.broadcast_arrays(*shape)
        points = np.stack([np.log2(np.maximum(c, 1e-3)).reshape(-1) for c in columns], axis=1)
        ratio, distance = surface.at(points)
        return ratio.reshape(columns[0].shape), distance.reshape(columns[0].shape)
