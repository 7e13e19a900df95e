"""Whether a run that was killed and goes on is bitwise the run that never stopped: the whole matrix.

{1 rank, 2 by FSDP2, by tensor parallelism, as a pipeline} x {eager, compiled} x {AdamW, Muon} x the types in
which this machine is quick. For each, one run is killed in its first step, in a save, in an evaluation, where
an epoch ends and in the decay, goes on each time, and is compared with an undisturbed one: the loss of every
step that any attempt took, and at the end every tensor. Another, of given minutes, is killed before and at
the clock's decision, and compared with a run that follows its decisions.

    python -m benchmarks.resume [--quick] [--out FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.kills import write_corpus
from colossus import api
from colossus.events import number
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer.run import Run
from tests.trainer.running import Kill, follower_of, kept_machine, run_of, state_of, train_in_processes

QUICK_ENOUGH = 0.5  # of the best type's rate: a slower type is not asked for by anyone
SETTINGS = [
    "data.tokenizer=bytes",
    "data.seq_len=32",
    "data.validation_fraction=0.2",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.intermediate_size=64",
    "run.global_batch=48",
    "run.threads=1",
    "optimizer.warmup_steps=2",
]
BY_STEPS = ["run.steps=16", "run.validate_every=4", "checkpoint.steps=4"]
BY_MINUTES = ["run.validate_every=50", "checkpoint.steps=10"]
MINUTES = {False: 0.15, True: 0.8}  # compiled or not: each attempt compiles, which counts
LAYOUTS = {
    "1 rank": ["layout.dp_shard=1"],
    "2 ranks": ["layout.dp_shard=2"],
    "2 ranks of tp": ["layout.tp=2"],
    "2 ranks of pp": ["layout.pp=2"],
}
PLACES = {
    "in its first step": Kill("step", 0),
    "in a save": Kill("save", 4),
    "in an evaluation": Kill("evaluation", 4),
    "where an epoch ends": Kill("before", 8),  # 369 samples an epoch: it ends within step 7
    "in the decay": Kill("step", 13),
}
TIMED_PLACES = {"before the decision": Kill("before", 20), "at the decision": Kill("decided", 0)}


def job_of(folder: Path, name: str, *settings: str) -> Job:
    places = [
        f"data.corpus={folder / 'corpus'}",
        f"data.folder={folder / 'data'}",
        f"run.folder={folder / name}",
    ]
    return api.resolve(load_job(None, [*SETTINGS, *places, *settings]))


def killed_run(job: Job, kills: list[Kill]) -> str | None:
    """Trains with a kill in each attempt and then to the end; what went wrong, or None."""
    for kill in kills:
        kill = dataclasses.replace(kill, rank=job.layout.num_ranks - 1)
        if -9 not in train_in_processes(job, [kill]):
            return f"was not killed {kill}"
    codes = train_in_processes(job)
    return f"ended with {codes}" if any(codes) else None


def differing(job: Job, undisturbed: Job) -> list[str]:
    """What differs: losses of any attempt by step, and tensors of the last checkpoint.

    An attempt that was killed may have gone beyond the end that the clock decides afterwards.
    """
    expected = run_of(undisturbed).loss
    steps = run_of(job).events("step")
    found = [f"step {e['step']}" for e in steps if expected.get(e["step"], e["loss"]) != number(e["loss"])]
    if run_of(job).loss.keys() != expected.keys():
        found.append("the number of steps")
    (step, tensors), (other_step, others) = state_of(job), state_of(undisturbed)
    if step != other_step or tensors.keys() != others.keys():
        return [*found, "the last checkpoint"]
    return found + [key[0] for key, tensor in tensors.items() if not torch.equal(tensor, others[key])]


def try_setting(folder: Path, settings: list[str]) -> list[str]:
    """What differs, over all places."""
    whole, killed = (job_of(folder, name, *BY_STEPS, *settings) for name in ("whole", "killed"))
    if any(train_in_processes(whole)):
        return ["the undisturbed run failed"]
    if wrong := killed_run(killed, list(PLACES.values())):
        return [wrong]
    found = differing(killed, whole)
    compiled = "layout.compile=true" in settings
    timed = job_of(folder, "timed", f"run.minutes={MINUTES[compiled]}", *BY_MINUTES, *settings)
    if wrong := killed_run(timed, list(TIMED_PLACES.values())):
        return [*found, wrong]
    decisions = [(d["name"], d["first_step"]) for d in run_of(timed).events("decision")]
    if len(set(decisions)) < len(decisions):
        found.append("a decision was made twice")
    follower = follower_of(timed, folder / "follower")
    if any(train_in_processes(follower, follow=Path(timed.run.folder))):
        return [*found, "the run that follows the decisions failed"]
    return found + [f"{what} (of given minutes)" for what in differing(timed, follower)]


def quick_types() -> list[str]:
    machine = this_machine()
    best = machine.best.flops_per_second
    return [t for t in ("fp32", "bf16") if t == "fp32" or machine.flops_per_second(t) > QUICK_ENOUGH * best]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one setting, eager")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to train")
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    kept_machine()
    matrix = list(itertools.product(LAYOUTS, (False, True), ("adamw", "muon"), quick_types()))
    if arguments.quick:
        matrix = [("1 rank", False, "muon", "fp32")]
    figures = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".resume-") as name:
        root = Path(name).resolve()
        write_corpus(root / "corpus")
        for index, (layout, compiled, optimizer, kind) in enumerate(matrix):
            folder = root / str(index)
            folder.mkdir()
            (folder / "corpus").symlink_to(root / "corpus")
            settings = [
                *LAYOUTS[layout],
                f"layout.compile={str(compiled).lower()}",
                f"optimizer.name={optimizer}",
                f"precision.type={kind}",
            ]
            began = time.monotonic()
            found = try_setting(folder, settings)
            title = f"{layout}, {'compiled' if compiled else 'eager'}, {optimizer}, {kind}"
            seconds = time.monotonic() - began
            print(f"{title:<40} {'; '.join(found[:5]) or 'bitwise equal'} ({seconds:.0f} s)", flush=True)
            compared = sum(
                len(Run(p).events("step")) for p in folder.iterdir() if (p / "events.jsonl").exists()
            )
            figures.append(
                Figure(f"{title}: differing", len(found), f"of {compared} steps and all tensors", "0")
            )
    places = len(PLACES) + len(TIMED_PLACES)
    figures += [
        Figure("settings", len(matrix), "settings"),
        Figure("kills, each in another place", places * len(matrix), "kills"),
        Figure("settings that differ in any bit", sum(f.value > 0 for f in figures), "settings", "0"),
    ]
    print()
    print("killed " + ", ".join([*PLACES, *TIMED_PLACES]))
    print_figures(figures)
    hardware = json.loads(json.dumps(dataclasses.asdict(this_machine())))
    write_receipt("resume", figures, arguments.out, hardware=hardware)
    return int(figures[-1].value > 0)


if __name__ == "__main__":
    sys.exit(main())
