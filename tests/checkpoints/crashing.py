"""Kills savers, really, and looks at what they left. Run as a program by `test_crashes`.

It imports torch once and forks for every life; a forked saver must not find another's thread pool, so this
cannot happen inside the test process.

    python -m tests.checkpoints.crashing points FOLDER    # before each call of the system that a save makes
    python -m tests.checkpoints.crashing random FOLDER N  # N lives, each ended at a random instant
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver

CALLS = ("mkdir", "open", "write", "fsync", "close", "unlink", "rmdir")


def state(step: int) -> dict[Key, torch.Tensor]:
    """A state that tells its step by every element."""
    return {
        ("w", "weight"): torch.full((300, 70), float(step)),
        ("w", "exp_avg"): torch.full((300, 70), -float(step)),
        ("n", "buffer"): torch.tensor(step),
    }


def saved_step(run: Path) -> int:
    """The step of the newest whole checkpoint, which holds that step's state and no other's; else 0."""
    checkpoint = newest_whole(run)
    if checkpoint is None:
        return 0
    for key, expected in state(checkpoint.step).items():
        assert torch.equal(checkpoint.read(*key), expected), f"{checkpoint.path} holds another step's {key}"
    assert checkpoint.meta == {"step": checkpoint.step}
    return checkpoint.step


def fork(live: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        try:
            live()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def outcome(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call: int) -> None:
    """Makes this process kill itself before its `call`-th call of the system, or midway if it is a write."""
    count = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == call:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def crash_at_points(folder: Path) -> int:
    """Saves step 1; then, for each point of saving step 2 (which also deletes step 1), dies there.

    Whatever the point: step 1 or 2 loads, rightly, and the next life saves step 2 or 3. Returns the points.
    """
    for point in range(1000):
        run = folder / f"point-{point}"
        with Saver(run, keep=1) as saver:
            saver.save(1, state(1), {"step": 1})

        def live(run: Path = run, point: int = point) -> None:
            with Saver(run, keep=1) as saver:
                die_at(point)
                saver.save(2, state(2), {"step": 2})

        ended = outcome(fork(live))
        assert ended in (0, -signal.SIGKILL), f"point {point}: exit code {ended}"
        step = saved_step(run)
        assert step == 2 if ended == 0 else step in (1, 2), f"point {point}: step {step} loads"
        with Saver(run, keep=1) as saver:
            saver.save(step + 1, state(step + 1), {"step": step + 1})
        assert saved_step(run) == step + 1
        assert len(list((run / "checkpoints").iterdir())) == 1, f"point {point}: something is left"
        shutil.rmtree(run)
        if ended == 0:
            return point
    raise AssertionError("a save never ended")


def crash_at_random(run: Path, lives: int) -> int:
    """Each life goes on from the newest checkpoint and saves every step, until killed; returns the steps.

    Nothing that was reported as saved is ever lost, and nothing loads wrongly.
    """
    draw = random.Random(0)
    for life in range(lives):
        reader, writer = os.pipe()

        def live(writer: int = writer) -> None:
            step = saved_step(run)
            with Saver(run, keep=2, keep_every=7) as saver:
                while True:
                    step += 1
                    saver.save(step, state(step), {"step": step})
                    for saved in saver.poll():
                        os.write(writer, saved.step.to_bytes(8, "little"))

        child = fork(live)
        os.close(writer)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        ended = outcome(child)
        assert ended == -signal.SIGKILL, f"life {life}: exit code {ended}"
        told = os.read(reader, 1 << 20)
        os.close(reader)
        reported = int.from_bytes(told[-8:], "little")
        assert saved_step(run) >= reported, f"life {life}: {reported} was saved, {saved_step(run)} is found"
    return saved_step(run)


def main() -> None:
    torch.set_num_threads(1)
    mode, folder, *rest = sys.argv[1:]
    if mode == "points":
        print(crash_at_points(Path(folder)))
    else:
        print(crash_at_random(Path(folder), int(rest[0])))


if __name__ == "__main__":
    main()
