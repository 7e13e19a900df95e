"""How tokens are spread over experts, which no tensor without numbers says: alike, or as is declared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colossus.architecture import Architecture, Experts
from colossus.errors import UserError
from colossus.events import kept_and_lost, read_events
from colossus.untrusted import MIB, read_text

WANTED = "numbers, a file of them, or the folder of a run"
MEASURED = "expert_load_mean"  # of a step's event: the busiest expert over the mean, in the mean over layers


@dataclass(frozen=True)
class Routing:
    """shares: of all visits, each expert's, in every layer and of every rank's tokens; they sum to 1. said:
    where they come from, in words."""

    shares: tuple[float, ...]
    said: str = ""

    def loads(self, ranks: int) -> list[float]:
        """Of each of the ranks that share the experts, neighbours together: its rows over the mean."""
        each = len(self.shares) // ranks
        sums = [math.fsum(self.shares[rank * each : (rank + 1) * each]) for rank in range(ranks)]
        return [round(ranks * share, 9) for share in sums]

    def kinds(self, ranks: int) -> list[tuple[int, int]]:
        """(a rank, how many it stands for): those that get most rows, and of the others, where some get
        fewer, the one that gets most."""
        loads = self.loads(ranks)
        most = [rank for rank in range(ranks) if loads[rank] == max(loads)]
        rest = [rank for rank in range(ranks) if loads[rank] < max(loads)]
        found = [(most[0], len(most))]
        return [*found, (max(rest, key=lambda rank: loads[rank]), len(rest))] if rest else found


def rows_of(loads: Sequence[float], num_rows: int) -> list[int]:
    """`num_rows` dealt out by loads whose mean is 1, in whole rows: what rounding leaves goes to those that
    it took most from."""
    exact = [num_rows * load / len(loads) for load in loads]
    rows = [math.floor(each) for each in exact]
    order = sorted(range(len(loads)), key=lambda rank: rows[rank] - exact[rank])
    for rank in order[: num_rows - sum(rows)]:
        rows[rank] += 1
    return rows


def routing_of(given: str | Path | Sequence[float], arch: Architecture) -> Routing:
    """What is declared for a model: of every expert its part of the visits, in any unit; of fewer how often
    the busiest ones are visited, in multiples of the mean; or a run, of which the step is taken whose busiest
    expert had most. The busiest are neighbours on one rank, which is the worst that can be.

    Raises:
        UserError: it is none of these, or no router could spread its tokens so.
    """
    if arch.experts is None:
        raise UserError(f"--routing {_short(given)}: the model has no experts; only with model.experts")
    if not isinstance(given, str | Path):
        return _declared(list(given), arch.experts, _short(given))
    values = _numbers(str(given))
    if values is not None:
        return _declared(values, arch.experts, str(given))
    path = Path(given)
    if path.is_dir():
        return _of_run(path, arch.experts)
    if not path.is_file():
        raise UserError(f"--routing {given}: must be {WANTED}")
    try:
        values = _numbers(read_text(path, MIB))
    except (UnicodeDecodeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text"
        raise UserError(f"--routing {given}: {why}; must be {WANTED}") from None
    if values is None:
        raise UserError(f"--routing {given}: has words that are no numbers; must be {WANTED}")
    return _declared(values, arch.experts, str(given))


def _numbers(text: str) -> list[float] | None:
    """Those of a list, by commas or blanks, in brackets or not; None where something else is in it."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    try:
        return [float(word) for word in inner.replace(",", " ").split()]
    except ValueError:
        return None


def _short(given: str | Path | Sequence[float]) -> str:
    return str(given) if isinstance(given, str | Path) else ",".join(f"{value:g}" for value in given)


def _declared(values: list[float], experts: Experts, name: str) -> Routing:
    num, most = experts.num_experts, experts.num_experts / experts.per_token
    if not 1 <= len(values) <= num:
        raise UserError(f"--routing {name}: {len(values)} numbers; 1 to {num}, one an expert at most")
    wrong = [value for value in values if not 0 <= value < math.inf]
    if wrong:
        raise UserError(f"--routing {name}: {wrong[0]:g} is no share of tokens; finite numbers from 0 on")
    total = math.fsum(values)
    if len(values) == num:
        if not total:
            raise UserError(f"--routing {name}: the sum is 0; at least one expert must be visited")
        multiples, said = [num * value / total for value in values], f"experts get tokens as {name}"
    else:
        if min(values) < 1 or total > num:
            raise UserError(
                f"--routing {name}: {len(values)} of {num} experts are the busiest ones, in multiples of the "
                f"mean: each at least 1, together at most {num}"
            )
        rest = (num - total) / (num - len(values))
        multiples = [*values, *[rest] * (num - len(values))]
        those = "expert gets" if len(values) == 1 else "experts get"
        said = f"the busiest {those} {name} times the mean"
    if max(multiples) > most * (1 + 1e-6):
        raise UserError(
            f"--routing {name}: an expert would get {max(multiples):.10g} times the mean; at most "
            f"{most:.10g}, since each token visits {experts.per_token} different ones of {num}"
        )
    return Routing(tuple(multiple / num for multiple in multiples), said)


def _of_run(folder: Path, experts: Experts) -> Routing:
    """By the step whose busiest expert had most: what does not fit then ends a run."""
    steps = [event for event in kept_and_lost(read_events(folder))[0] if event.get(MEASURED) is not None]
    steps = [step for step in steps if step[MEASURED] not in ("nan", "inf", "-inf")]  # of a run gone wrong
    if not steps:
        raise UserError(f"--routing {folder}: no step of it has measured {MEASURED}; must be {WANTED}")
    most = experts.num_experts / experts.per_token
    for step in steps:
        load = step[MEASURED]
        if isinstance(load, bool) or not isinstance(load, int | float) or not 0.99 <= load < math.inf:
            raise UserError(
                f"--routing {folder}: its events are damaged: in step {step.get('step')} {MEASURED} is "
                f"{load!r}, and the busiest expert gets 1 to {most:g} times the mean"
            )
    step = max(steps, key=lambda event: float(event[MEASURED]))
    load = min(max(1.0, float(step[MEASURED])), most)  # it was rounded
    made = _declared([load], experts, f"{folder} ({MEASURED}={load:g})")
    return Routing(made.shares, f"the busiest expert gets {load:g} times the mean, as in step "
                                f"{step['step']:,} of {folder}")  # fmt: skip
