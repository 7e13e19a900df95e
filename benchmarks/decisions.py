"""Whether a run chooses well: the type, threads and compilation that it settles on, against all combinations.

For each kind of processor at hand and each width a run of five minutes is begun with empty caches, as a
newcomer's, and stopped once it has decided. Then all combinations take steps in turns. What counts is the
tokens by the end of the five minutes, compiling included; the choice is good where it has 95% of the best
one's, or where in some turn it was the better.

A processor is held to fewer instructions by the variables of ATen, oneDNN and MKL. That is reported as held:
a real processor of that kind has other caches, clocks and units.

    python -m benchmarks.decisions [--quick] [--out FILE] [--kind NAME] [--widths W,W] [--turns N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colossus.perf.receipts import Figure, print_figures, write_receipt

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (96, 128, 256, 384)
MINUTES, USABLE = 5.0, 0.85
TURNS = 6
FAR = 1.6  # times slower than the best: not timed further
KINDS: dict[str, tuple[str | None, dict[str, str]]] = {  # name -> the feature that it lacks, what holds it
    "as it is": (None, {}),
    "held to AVX-512 with bf16": ("amx_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "held to AVX-512": ("avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "held to AVX2": (
        "avx512f",
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
}


@dataclass(frozen=True)
class Combination:
    type: str
    threads: int
    compile: bool

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return f"{self.type}, {threads}, {'compiled' if self.compile else 'eager'}"


def decide(folder: Path, width: int, quick: bool) -> dict[str, Any]:
    """Begins a run, stops it once it has decided, and returns the job, the decision and the seconds."""
    from colossus import api
    from colossus.trainer.hooks import Hook
    from colossus.trainer.hooks.compile import LOOKS, UNSTEADY, WATCHED
    from colossus.trainer.step import StepResult
    from colossus.trainer.training import Training

    class StopOnceDecided(Hook):
        def after_step(self, training: Training, result: StepResult) -> None:
            value = training.decisions.get("machine", training.step) or {}
            looked = training.step > UNSTEADY + LOOKS * WATCHED and "eager_step_seconds" not in value
            if "compiled_gain" in value or looked:
                training.ask_to_stop("asked")

    words = [f"data.corpus={folder / 'corpus'}", f"data.folder={folder / 'shards'}", "data.tokenizer=bytes"]
    words += ["model.vocab_size=4096", f"model.hidden_size={width}", f"run.folder={folder / f'run-{width}'}"]
    words += [f"run.minutes={MINUTES}", "run.validate_every=0"]
    words += ["layout.compile=false"] if quick else []
    began = time.monotonic()
    job = api.resolve(api.load_job(None, words))
    resolved = time.monotonic() - began
    run = api.train(job, [StopOnceDecided()])
    (*_, last) = (event for event in run.events("decision") if event["name"] == "machine")
    return {"job": str(run.folder / "job.toml"), "value": last["value"], "resolve_seconds": resolved}


def race(job_file: str, turns: int, compile_too: bool) -> list[tuple[Combination, list[float]]]:
    """Tokens/s of each combination, turn by turn; of one that is far behind, of a single step."""
    import torch

    from colossus.data.loader import Batch
    from colossus.derive.settings import candidates
    from colossus.job import Job, load_job
    from colossus.measure.attention import fused_is_quicker
    from colossus.measure.machine import this_machine
    from colossus.measure.memory import keep_freed
    from colossus.parallel.program import decoders
    from colossus.parallel.world import World
    from colossus.trainer.state import TrainState
    from colossus.trainer.step import train_step

    machine, job = this_machine(), load_job(Path(job_file))
    keep_freed(machine.keeps_freed_memory)
    job = job.without(*(n for n in ("precision.type", "run.threads") if not job.asked_for(n)))
    sequences, seq_len = job.run.global_batch, job.data.seq_len
    num = sequences * seq_len
    ids_BT = torch.randint(job.model.vocab_size, (sequences, seq_len + 1))
    batch = Batch(0, 0, ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), None, num, num)
    world = World(0, 1, torch.device("cpu"))

    def contestant(combination: Combination) -> Callable[[], float]:
        values = {"precision.type": combination.type, "layout.compile": combination.compile}
        mine: Job = job.put(values | {"run.threads": combination.threads}, "argument")
        state = TrainState.build(mine, world)
        (decoder,) = decoders(state.model)
        fused = fused_is_quicker(job.model, seq_len, combination.type, combination.threads, "cpu")
        decoder.fused_attention = fused

        def step() -> float:
            torch.set_num_threads(combination.threads)
            began = time.perf_counter()
            train_step(state, batch, num, 1.0, mine, world)
            return num / (time.perf_counter() - began)

        return step

    steps: dict[Combination, Callable[[], float]] = {}
    rates: dict[Combination, list[float]] = {}
    for setting in candidates(job, machine):
        for compile_ in (False, True)[: 1 + (compile_too and machine.compiler is not None)]:
            combination = Combination(setting.type, setting.threads, compile_)
            steps[combination] = contestant(combination)
            began = time.perf_counter()
            steps[combination]()
            print(f"    {combination}: the first step {time.perf_counter() - began:.1f} s", flush=True)
            steps[combination]()
            rates[combination] = [max(steps[combination]() for _ in range(2))]
    best = max(found[0] for found in rates.values())
    near = [combination for combination, found in rates.items() if found[0] * FAR >= best]
    for combination in near:
        rates[combination] = []
    for turn in range(turns):
        for combination in near if turn % 2 == 0 else reversed(near):
            rates[combination].append(steps[combination]())
    return list(rates.items())


def judge(
    value: dict[str, Any], rates: list[tuple[Combination, list[float]]], compile_seconds: float
) -> tuple[Combination, Combination, float, float, float]:
    """(chosen, best, the chosen one's tokens over the best one's by the end, its least and its most over the
    turns)."""
    seconds = MINUTES * 60 * USABLE
    share = {True: (seconds - compile_seconds) / seconds, False: 1.0}
    tokens = {combination: [share[combination.compile] * r for r in found] for combination, found in rates}
    chosen = Combination(value["type"], value["threads"], value["compile"])
    best = max(tokens, key=lambda combination: statistics.median(tokens[combination]))
    ratios = [mine / other for mine, other in zip(tokens[chosen], tokens[best], strict=False)]
    median = statistics.median(tokens[chosen]) / statistics.median(tokens[best])
    return chosen, best, median, min(ratios), max(ratios)


def figures_of(kind: str, width: int, found: dict[str, Any]) -> list[Figure]:
    rates = [(Combination(**c), r) for c, r in found["rates"]]
    value = found["value"]
    compile_seconds = value.get("compile_seconds") or found["compile_seconds"]
    chosen, best, median, low, high = judge(value, rates, compile_seconds)
    by = dict(rates)
    print(f"  {kind}, width {width}: chosen {chosen}; best {best}: {median:.3f} ({low:.3f} to {high:.3f})")
    where = f"width {width}, {kind}"
    steady = statistics.median(by[chosen]) / max(statistics.median(r) for r in by.values())
    good = median >= 0.95 or high >= 1.0
    return [
        Figure(f"{where}: chosen ({chosen})", statistics.median(by[chosen]), "tokens/s"),
        Figure(f"{where}: best by the end ({best})", statistics.median(by[best]), "tokens/s"),
        Figure(f"{where}: tokens in five minutes, chosen over best", median, "", ">= 0.95 or overlapping"),
        Figure(f"{where}: least over the turns", low, ""),
        Figure(f"{where}: most over the turns", high, ""),
        Figure(f"{where}: steady rate, chosen over the quickest", steady, ""),
        Figure(f"{where}: compiling", compile_seconds, "s"),
        Figure(f"{where}: deriving the job", found["resolve_seconds"], "s", "<= 12"),
        Figure(f"{where}: good", float(good), "", "= 1"),
    ]


def one(folder: Path, width: int, turns: int, quick: bool) -> None:
    """A kind and a width, in a process of their own; leaves what it found as JSON."""
    from colossus.derive.settings import COMPILE_SECONDS

    found = decide(folder, width, quick)
    rates = race(found["job"], turns, not quick)
    found |= {"rates": [(asdict(c), r) for c, r in rates], "compile_seconds": COMPILE_SECONDS}
    (folder / f"found-{width}.json").write_text(json.dumps(found))


def measure(names: list[str], widths: list[int], turns: int, quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            corpus = folder / "corpus"
            corpus.mkdir()
            for index, source in enumerate(sorted(ROOT.glob("colossus/**/*.py"))):
                (corpus / f"{index}.txt").write_text(source.read_text())
            environment = os.environ | KINDS[name][1] | {"COLOSSUS_CACHE": str(folder / "cache")}
            environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
            environment.setdefault("GOMP_SPINCOUNT", "3000")  # as the command has it
            for width in widths:
                command = [sys.executable, "-m", "benchmarks.decisions", "--one", str(folder), str(width)]
                command += ["--turns", str(turns), *(["--quick"] if quick else [])]
                subprocess.run(command, cwd=ROOT, env=environment, check=True)
                figures += figures_of(name, width, json.loads((folder / f"found-{width}.json").read_text()))
    return figures


def kinds_at_hand() -> list[str]:
    """This machine, and what it can be held to."""
    from colossus.measure.instructions import instructions

    shown = instructions().split()
    return [name for name, (lacks, _) in KINDS.items() if lacks is None or lacks in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one narrow model, nothing compiled")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="default: all at hand")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WIDTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), int(arguments.one[1]), arguments.turns, arguments.quick)
        return
    from colossus.measure.machine import this_machine

    kinds = arguments.kind or (["as it is"] if arguments.quick else kinds_at_hand())
    widths = [64] if arguments.quick else [int(width) for width in arguments.widths.split(",")]
    figures = measure(kinds, widths, arguments.turns, arguments.quick)
    print_figures(figures)
    write_receipt("decisions", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
