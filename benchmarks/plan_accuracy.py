"""How well `plan` predicts published runs.

Rows are split by a hash of their (publisher, model): one half calibrates the scalars of
`colossus/perf/scalars.toml` (`--fit` writes it), the other half is scored. Blanks of a row are averaged over
what its program does by default. Per set: the mean, median and 90th percentile of the absolute error of step
time, the rank correlation, and the regret of the layout that we would have chosen.

python -m benchmarks.plan_accuracy [--quick] [--out] [--rows] [--fit] [--scalars] [--worst] [--blind]
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import colossus.perf
from benchmarks.plan_rows import Run, load
from colossus.hardware.fleets import hardware_of
from colossus.job import load_job
from colossus.perf import software
from colossus.perf.price import Pricer, fitted
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem, estimate
from colossus.planner.measured import corrections_for

SCALARS = Path(colossus.perf.__file__).parent / "scalars.toml"
ROWS_OF_A_GROUP = 40  # that calibrate: a publisher who prints forty rows of one model weighs no more
GOAL_OF_REGRET = "at most 3.0"
GOALS = {
    "vTrain, many nodes": 8.0, "vTrain, one node": 8.0, "Hopper dense": 6.0, "Hopper experts": 10.0,
    "Blackwell experts": 10.0,
}  # fmt: skip
GENERATIONS = ("ampere", "hopper", "blackwell")
BOUNDS = {  # of each scalar, by what it means
    "ampere_products": (0.6, 1.05), "hopper_products": (0.6, 1.05), "blackwell_products": (0.4, 1.05),
    "hopper_fp8": (0.4, 1.05), "blackwell_fp8": (0.4, 1.05), "attention": (0.2, 0.8), "fused": (0.3, 1.2),
    "eager": (0.5, 3.0), "eager_host": (1e-6, 1e-4), "eager_message": (0.0, 1e-3), "experts": (0.3, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    run: Run
    predicted: float
    by_variant: tuple[float, ...]

    @property
    def error(self) -> float:
        return self.predicted / self.run.seconds - 1


def predict(
    runs: Sequence[Run], scalars: Mapping[str, float] | None = None, *, tables: bool = True
) -> list[Scored]:
    """Seconds of a step of every run; each problem is priced once for all its layouts. tables: with what was
    timed of accelerators like theirs."""
    problems: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        problems[run.problem_key].append(i)
    found: dict[int, Scored] = {}
    for members in problems.values():
        first = runs[members[0]]
        timed = corrections_for(first.hardware) if tables else None
        pricer = Pricer(first.hardware, first.software, scalars or fitted(), timed)
        problem = Problem(first.arch, first.seq_len, first.global_batch, first.precision, pricer)
        rows = [(i, row) for i in members for row in runs[i].variants]
        seconds = estimate(problem, Layouts.of([row for _, row in rows])).seconds
        for i in members:
            mine = [float(s) for (owner, _), s in zip(rows, seconds, strict=True) if owner == i]
            found[i] = Scored(runs[i], float(np.exp(np.mean(np.log(mine)))), tuple(mine))
    return [found[i] for i in range(len(runs))]


def sample(runs: Iterable[Run]) -> list[Run]:
    """The rows that scalars are fitted to: of each calibrating group a few, by hash."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.calibrates:
            groups[run.group].append(run)
    chosen = []
    for members in groups.values():
        members.sort(key=lambda run: hashlib.sha256(run.id.encode()).hexdigest())
        chosen += members[:ROWS_OF_A_GROUP]
    return chosen


def weights(runs: Sequence[Run]) -> NDArray[np.float64]:
    """Of each row: every set counts alike, in it every group, in it every row."""
    rows: dict[str, int] = defaultdict(int)
    groups: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        rows[run.set + run.group] += 1
        groups[run.set].add(run.group)
    found = np.array([1 / (len(groups[run.set]) * rows[run.set + run.group]) for run in runs])
    return found / found.sum()


def residuals(runs: Sequence[Run], scalars: Mapping[str, float]) -> NDArray[np.float64]:
    """Logarithm of predicted over measured."""
    return np.log1p([item.error for item in predict(runs, scalars)])


def _depends(run: Run, names: Sequence[str]) -> bool:
    """Whether a run's prediction may move with one of these scalars."""
    generation = run.hardware.accelerator.generation
    others = tuple(g for g in ("ampere", "hopper", "blackwell") if g != generation)
    mine = [name for name in names if not name.startswith(others)]
    if run.software.dispatch != "eager_host":
        mine = [name for name in mine if name not in ("eager_host", "eager_message")]
    return bool(mine)


def loss(runs: Sequence[Run], scalars: Mapping[str, float]) -> float:
    """Mean absolute residual."""
    return float(np.sum(weights(runs) * np.abs(residuals(runs, scalars))))


def fit(runs: Sequence[Run], names: Sequence[str], rounds: int = 8) -> dict[str, tuple[float, float, float]]:
    """Scalar -> (value, low, high): least absolute residuals by reweighted Gauss-Newton steps within bounds.

    low, high: the middle 90% over resampled groups, each solved with the last step's derivatives.
    """
    kept = dict(fitted())
    share = weights(runs)
    low, high = (np.array([BOUNDS[name][i] for name in names]) for i in (0, 1))
    width = high - low
    at = np.clip(np.array([fitted()[name] for name in names]), low, high)
    now = residuals(runs, kept | dict(zip(names, at, strict=True)))
    best = float(np.sum(share * np.abs(now)))
    for turn in range(rounds):
        slope = _slope(runs, names, at, low, high, now)
        reach = (np.maximum((low - at) / width, -0.3), np.minimum((high - at) / width, 0.3))
        step = _solve(slope, now, share, *reach)
        for shorter in (1.0, 0.5, 0.25, 0.1, 0.05):
            tried = np.clip(at + shorter * step * width, low, high)
            found = residuals(runs, kept | dict(zip(names, tried, strict=True)))
            value = float(np.sum(share * np.abs(found)))
            if value < best - 1e-6:
                at, now, best = tried, found, value
                break
        else:
            break
        print(f"round {turn}: mean absolute residual {best:.4f}", flush=True)
    ends = _ends(runs, names, _slope(runs, names, at, low, high, now), now, at, width)
    return {name: (float(at[i]), *ends[name]) for i, name in enumerate(names)}


def _slope(
    runs: Sequence[Run],
    names: Sequence[str],
    at: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    now: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Derivatives of the residuals, [rows, scalars], in widths of the bounds."""
    columns = []
    for i in range(len(names)):
        step = 0.02 * (high[i] - low[i]) * (1 if at[i] < (low[i] + high[i]) / 2 else -1)
        moved = at.copy()
        moved[i] += step
        change = residuals(runs, dict(fitted()) | dict(zip(names, moved, strict=True))) - now
        columns.append(change / step * (high[i] - low[i]))
    return np.stack(columns, axis=1)


def _solve(
    slope: NDArray[np.float64],
    now: NDArray[np.float64],
    share: NDArray[np.float64],
    least: NDArray[np.float64],
    most: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The step, in widths and between `least` and `most`, that makes the absolute residuals small: squares,
    reweighted; what leaves its bounds is held there, and the others are solved for again."""
    step = np.zeros(slope.shape[1])
    for _ in range(12):
        weight = share / np.maximum(np.abs(now + slope @ step), 0.02)
        held = np.zeros(len(step), dtype=bool)
        trial = np.zeros(len(step))
        for _ in range(len(step)):
            free = ~held
            rest = now + slope[:, held] @ trial[held]
            part = slope[:, free]
            normal = (part * weight[:, None]).T @ part + 1e-3 * np.eye(int(free.sum()))
            trial[free] = -np.linalg.solve(normal, (part * weight[:, None]).T @ rest)
            out = free & ((trial < least) | (trial > most))
            if not out.any():
                break
            trial[out] = np.clip(trial[out], least[out], most[out])
            held |= out
        step = np.clip(trial, least, most)
    return step


def _ends(
    runs: Sequence[Run],
    names: Sequence[str],
    slope: NDArray[np.float64],
    now: NDArray[np.float64],
    at: NDArray[np.float64],
    width: NDArray[np.float64],
) -> dict[str, tuple[float, float]]:
    groups = sorted({run.group for run in runs})
    member = np.array([groups.index(run.group) for run in runs])
    share, rng, tried = weights(runs), np.random.default_rng(0), []
    low, high = (np.array([BOUNDS[name][i] for name in names]) for i in (0, 1))
    reach = ((low - at) / width, (high - at) / width)
    for _ in range(200):
        times = np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups))
        tried.append(at + _solve(slope, now, share * times[member], *reach) * width)
    found = np.quantile(np.array(tried), (0.05, 0.95), axis=0)
    return {
        name: (float(max(BOUNDS[name][0], found[0, i])), float(min(BOUNDS[name][1], found[1, i])))
        for i, name in enumerate(names)
    }


def write_scalars(found: Mapping[str, tuple[float, float, float]]) -> None:
    """Puts the fitted values into `scalars.toml`, whose other lines stay."""
    lines, name = [], ""
    for line in SCALARS.read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        if line.startswith(("low =", "high =")):
            continue
        if line.startswith("value =") and name in found:
            value, low, high = found[name]
            lines += [f"value = {value:.4g}", f"low = {low:.4g}", f"high = {high:.4g}"]
        else:
            lines.append(line)
    SCALARS.write_text("\n".join(lines) + "\n")


def table(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Set -> its figures, in percent but for the rank correlation and the count."""
    sets: dict[str, list[Scored]] = defaultdict(list)
    for item in scored:
        sets[item.run.set].append(item)
    figures = {}
    for name, items in sorted(sets.items()):
        errors = 100 * np.abs([item.error for item in items])
        figures[name] = {
            "rows": len(items),
            "mean": float(errors.mean()),
            "median": float(np.median(errors)),
            "p90": float(np.quantile(errors, 0.9)),
            "signed": float(np.mean([100 * item.error for item in items])),
            "rank": _rank_correlation(items),
            "regret": regret(items),
        }
    return figures


def known_less(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Figures of the same sets as they would be if less were known, on which the bands of plans rest: with no
    table of timings; and with the scalars of another generation, as where none of a part's own was fitted."""
    figures = {}
    for name, row in table(predict(runs, tables=False)).items():
        if name.startswith("Hopper"):  # of which there is a table
            figures[f"{name}, no table"] = row
    for mine in GENERATIONS:
        own = [run for run in runs if run.hardware.accelerator.generation == mine]
        for other in GENERATIONS:
            if other != mine:
                scored = predict(own, _scalars_of(mine, other), tables=False)
                for name, row in table(scored).items():
                    figures[f"{name}, as {other}"] = row
    return figures


def _scalars_of(mine: str, other: str) -> dict[str, float]:
    """With those of products of another generation in place of mine."""
    found = dict(fitted())
    for kind in ("products", "fp8"):
        if f"{mine}_{kind}" in found and f"{other}_{kind}" in found:
            found[f"{mine}_{kind}"] = found[f"{other}_{kind}"]
    return found


def _rank_correlation(items: Sequence[Scored]) -> float:
    if len(items) < 3:
        return float("nan")
    ranks = [np.argsort(np.argsort(values)) for values in
             ([i.predicted for i in items], [i.run.seconds for i in items])]  # fmt: skip
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def regret(items: Iterable[Scored]) -> float:
    """Measured time of the layout that we rank first over the best measured, less 1, in percent: the mean
    over groups of four rows or more that differ in layout alone."""
    groups: dict[tuple[object, ...], list[Scored]] = defaultdict(list)
    for item in items:
        groups[item.run.alike].append(item)
    lost = []
    for members in groups.values():
        if len({tuple(sorted(item.run.variants[0].items())) for item in members}) >= 4:
            ours = min(members, key=lambda item: item.predicted)
            lost.append(ours.run.seconds / min(item.run.seconds for item in members) - 1)
    return 100 * float(np.mean(lost)) if lost else float("nan")


def show(title: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{title}")
    print(
        f"{'set':22}{'rows':>6}{'mean %':>9}{'median':>9}{'p90':>8}{'signed':>9}{'rank':>8}{'regret %':>10}"
    )
    for name, row in figures.items():
        print(
            f"{name:22}{row['rows']:6.0f}{row['mean']:9.1f}{row['median']:9.1f}{row['p90']:8.1f}"
            f"{row['signed']:9.1f}{row['rank']:8.3f}{row['regret']:10.1f}"
        )


def llama3() -> list[tuple[str, float, float]]:
    """The layouts of arXiv 2407.21783, table 4: (name, seconds of a step, MFU). No scalar of their own."""
    base = load_job(None, ["model=llama3.1-405b"]).model
    fleet = hardware_of(load_job(None, ["fleet=llama3-24k"]).fleet)
    found = []
    for name, count, cp, dp, seq_len, batch in (
        ("8,192 GPUs", 8192, 1, 64, 8192, 2048),
        ("16,384 GPUs", 16384, 1, 128, 8192, 2048),
        ("16,384 GPUs, context 131,072", 16384, 16, 8, 131072, 128),
    ):
        pricer = Pricer(fleet.with_count(count), software.META, fitted(), corrections_for(fleet))
        problem = Problem(base, seq_len, batch, "bf16", pricer)
        layouts = Layouts.of(
            [
                {"tp": 8, "cp": cp, "pp": 16, "dp_shard": dp, "schedule": "interleaved_1f1b",
                 "stages_per_rank": 8, "zero": 2.0, "sp": 1.0}
            ]
        )  # fmt: skip
        made = estimate(problem, layouts)
        found.append((name, float(made.seconds[0]), float(made.mfu(problem)[0])))
    return found


def worst(scored: Sequence[Scored], count: int) -> None:
    for item in sorted(scored, key=lambda item: -abs(item.error))[:count]:
        run, row = item.run, item.run.variants[0]
        row = {"cp": 1, "ep": 1, "stages_per_rank": 1} | dict(row)
        keys = " ".join(f"{k}{row[k]}" for k in ("tp", "cp", "pp", "ep", "micro_batch", "zero", "recompute"))
        print(
            f"{100 * item.error:+6.0f}%  {run.id} {run.group[:44]:44} {run.precision} n={run.hardware.count} "
            f"{keys} x{row['stages_per_rank']} batch {run.global_batch} s{run.seq_len}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="score this file, all of its complete rows")
    parser.add_argument("--fit", action="store_true", help="calibrate, and write scalars.toml")
    parser.add_argument("--scalars", help="fit these alone, with commas between; the others stay")
    parser.add_argument("--worst", type=int, default=0, help="show so many of the worst calibration rows")
    parser.add_argument("--blind", action="store_true", help="show no figure of a held-out row")
    parser.add_argument("--quick", action="store_true", help="score no single-node rows")
    parser.add_argument("--out", help="write a receipt")
    arguments = parser.parse_args()
    runs = list(load(arguments.rows))
    if arguments.quick:
        runs = [run for run in runs if run.set != "vTrain, one node"]
    if arguments.fit:
        names = arguments.scalars.split(",") if arguments.scalars else list(BOUNDS)
        chosen = [run for run in sample(runs) if _depends(run, names)]
        print(
            f"fitting {len(names)} scalars to {len(chosen)} rows of {len({r.group for r in chosen})} groups"
        )
        write_scalars(fit(chosen, names))
        fitted.cache_clear()
    began = time.perf_counter()
    scored = predict(runs)
    seconds = time.perf_counter() - began
    if arguments.rows is not None:
        figures = table(scored)
        less = {}
        show(f"{arguments.rows}: {len(runs)} complete rows, all scored", figures)
    else:
        if arguments.worst:
            worst([s for s in scored if s.run.calibrates], arguments.worst)
        show("calibration rows", table([s for s in scored if s.run.calibrates]))
        figures = table([s for s in scored if not s.run.calibrates])
        if arguments.blind:
            return
        show("held-out rows", figures)
        less = known_less([run for run in runs if not run.calibrates])
        show("held-out rows, if less were known", less)
    print(f"\npredicted {len(runs)} runs in {seconds:.1f} s; scalars:")
    for name, value in fitted().items():
        print(f"  {name} = {value:.4g}")
    print("\nLlama 3 405B (arXiv 2407.21783, table 4), without a scalar of its own:")
    receipt = []
    for name, step, mfu in llama3():
        print(f"  {name:32}{step:8.2f} s   MFU {100 * mfu:.1f}% (causal attention counted half, bf16 peak)")
        receipt.append(Figure(f"llama3 405B, {name}, step", step, "s"))
        receipt.append(Figure(f"llama3 405B, {name}, MFU", 100 * mfu, "%"))
    for name, row in figures.items():
        goal = f"at most {GOALS[name]}" if name in GOALS else None
        receipt.append(Figure(f"{name}: rows", row["rows"], "rows"))
        receipt.append(Figure(f"{name}: mean absolute error", row["mean"], "%", goal))
        for key, unit in (("median", "%"), ("p90", "%"), ("rank", "correlation"), ("regret", "%")):
            if not np.isnan(row[key]):
                goal = GOAL_OF_REGRET if key == "regret" else None
                receipt.append(Figure(f"{name}: {key}", row[key], unit, goal))
    receipt += [Figure(f"{name}: p90", row["p90"], "%") for name, row in less.items()]
    print()
    print_figures(receipt)
    write_receipt("plan_accuracy", receipt, arguments.out, {"scalars": dict(fitted())})


if __name__ == "__main__":
    main()
