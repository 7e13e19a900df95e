"""The quickest layouts that a search found, asked for once more: does the training program itself fit?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from colossus.errors import MachineError, UserError
from colossus.planner.choice import Choice
from colossus.planner.estimate import Problem
from colossus.planner.search import Found


@dataclass(frozen=True)
class Answer:
    """What a dry run says of a layout: bytes on the rank that has least room, of so many that it has. ranks:
    that were run, one for each kind. fused: bytes that compiled layers need less, by formulas; `reserved` is
    without them."""

    choice: Choice
    reserved: float
    capacity: float
    ranks: int
    fused: float = 0.0

    @property
    def fits(self) -> bool:
        return self.reserved <= self.capacity


Ask = Callable[[Problem, Choice], Answer]
"""Raises `UserError` where the program can't be run so, `MachineError` where this machine can't."""


@dataclass(frozen=True)
class Confirmed:
    """What a plan's memory rests on, beside formulas. best: the winner's; None: not asked. refused: quicker
    ones that would not fit. why: what kept from asking."""

    best: Answer | None = None
    refused: tuple[Answer, ...] = ()
    why: str | None = None

    @property
    def none_fits(self) -> bool:
        return self.best is None and bool(self.refused)


def confirmed(found: Found, problem: Problem, ask: Ask) -> tuple[Found, Confirmed]:
    """The search's choices from the quickest on that fits; all of them where none does."""
    refused: list[Answer] = []
    for index, choice in enumerate(found.choices):
        try:
            answer = ask(problem, choice)
        except (UserError, MachineError) as error:
            return found, Confirmed(refused=tuple(refused), why=str(error))
        if answer.fits:
            left = replace(found, choices=found.choices[index:])
            return left, Confirmed(answer, tuple(refused))
        refused.append(answer)
    return found, Confirmed(refused=tuple(refused))
