"""How published tensors make up a model's, and back: a rule for each, read in both directions.

A rule names tensors of `architecture.parameter_table` and published ones; `#` stands for the number of a
layer, `*` for that of an expert. What a rule says is said in views (`views.py`): nothing is read until a
box is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from colossus.architecture import Architecture
from colossus.models.hf.tensors import Box, Readable, Spec
from colossus.models.hf.views import Joined, Part, Renamed, Reordered, Stacked, Transposed

Rows = Callable[[Architecture], list[int]]
"""Of a published tensor, in the order in which ours has them."""


@dataclass(frozen=True)
class Rule(ABC):
    """Tensors of ours and the published ones that they are made of."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    @abstractmethod
    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        """Ours, of the names and shapes of `names`."""

    @abstractmethod
    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        """The published ones, of these names."""


class Same(Rule):
    """Another name."""

    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        return [Renamed.of(names[0].name, theirs[0])]

    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        return [Renamed.of(names[0], ours[0])]


class Turned(Rule):
    """The last two dimensions exchanged."""

    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        return [Transposed.of(names[0].name, theirs[0])]

    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        return [Transposed.of(names[0], ours[0])]


class PerExpert(Rule):
    """One published tensor an expert; ours is their stack."""

    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        return [Stacked.of(names[0].name, theirs)]

    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        return [OneOf.of(name, ours[0], expert) for expert, name in enumerate(names)]


@dataclass(frozen=True)
class Fused(Rule):
    """Several of ours in one published tensor, one after the other along `axis`, or with indices in turns.

    turned: the published tensor has its last two dimensions exchanged; `axis` counts before that.
    """

    axis: int = 0
    in_turns: bool = False
    turned: bool = False

    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        (whole,) = theirs
        whole = Transposed.of(whole.name, whole) if self.turned else whole
        found, begin = list[Readable](), 0
        for index, spec in enumerate(names):
            size = spec.shape[self.axis]
            part = slice(begin, begin + size)
            if self.in_turns:
                part = slice(index, None, len(names))
            found.append(Part.of(spec.name, whole, (*(slice(None),) * self.axis, part)))
            begin += size
        return found

    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        whole: Readable = Joined.of(names[0], ours, self.axis)
        if self.in_turns:
            size = ours[0].shape[self.axis]
            order = [part * size + index for index in range(size) for part in range(len(ours))]
            whole = Reordered.of(names[0], whole, order, self.axis)
        return [Transposed.of(names[0], whole) if self.turned else whole]


@dataclass(frozen=True)
class Permuted(Rule):
    """Rows in another order."""

    rows: Rows = lambda arch: []

    def take(
        self, names: Sequence[Spec], theirs: Sequence[Readable], arch: Architecture
    ) -> Sequence[Readable]:
        return [Reordered.of(names[0].name, theirs[0], self.rows(arch))]

    def give(self, names: Sequence[str], ours: Sequence[Readable], arch: Architecture) -> Sequence[Readable]:
        rows = self.rows(arch)
        back = [0] * len(rows)
        for ours_row, theirs_row in enumerate(rows):
            back[theirs_row] = ours_row
        return [Reordered.of(names[0], ours[0], back)]


@dataclass(frozen=True, slots=True)
class OneOf(Readable):
    """One of a stack."""

    stack: Readable
    index: int

    @classmethod
    def of(cls, name: str, stack: Readable, index: int) -> OneOf:
        return cls(name, stack.shape[1:], stack.dtype, stack, index)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        self.stack.fill(out.unsqueeze(0), (range(self.index, self.index + 1), *box))


@dataclass(frozen=True, slots=True)
class Blank(Readable):
    """A tensor of which only name, shape and type are known."""

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Blank:
        return cls(name, tuple(shape), torch.float32)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        raise AssertionError(f"{self.name} has no values")


@dataclass(frozen=True)
class Bound:
    """A rule for one layer (or for none), with the names filled in."""

    rule: Rule
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def bind(rules: Sequence[Rule], arch: Architecture, names: Mapping[str, object]) -> Iterator[Bound]:
    """The rules whose tensors a model has, for each of its layers. names: of the model's tensors."""
    num_experts = arch.experts.num_experts if arch.experts is not None else 0
    for rule in rules:
        layers = range(arch.num_layers) if "#" in rule.ours[0] else range(1)
        for layer in layers:
            ours = tuple(name.replace("#", str(layer)) for name in rule.ours)
            if not all(name in names for name in ours):
                continue
            theirs = [name.replace("#", str(layer)) for name in rule.theirs]
            if "*" in theirs[0]:
                theirs = [theirs[0].replace("*", str(expert)) for expert in range(num_experts)]
            yield Bound(rule, ours, tuple(theirs))
