"""Kills savers, really, and looks at what they left. Run as a program by `test_crashes`.

It imports torch once and forks for every life; a forked saver must not find another's thread pool, so this
cannot happen inside the test process.

    python -m tests.checkpoints.crashing points FOLDER N  # at each call of the system of a save after step N
    python -m tests.checkpoints.crashing commit FOLDER N  # at each of the process that commits it
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

from colossus.checkpoints import committer
from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver
from colossus.errors import MachineError
from tests.checkpoints.outside import die_at, with_fault

ENOUGH = 10  # steps


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


def crash_at_points(folder: Path, saved: int) -> int:
    """Saves step `saved`, where that is not 0; then, for each point in the life of a Saver that saves the
    next step (and deletes the one before), dies there.

    Whatever the point: one of the two loads, rightly, or the run starts anew, and the next life saves the
    step after that. Returns the points.
    """
    for point in range(1000):
        run = folder / f"point-{point}"
        if saved:
            with Saver(run, keep=1) as saver:
                saver.save(saved, state(saved), {"step": saved})

        def live(run: Path = run, point: int = point) -> None:
            die_at(point)
            with Saver(run, keep=1) as saver:
                saver.save(saved + 1, state(saved + 1), {"step": saved + 1})

        ended = outcome(fork(live))
        assert ended in (0, -signal.SIGKILL), f"point {point}: exit code {ended}"
        step = saved_step(run)
        allowed = (saved + 1,) if ended == 0 else (saved, saved + 1)
        assert step in allowed, f"point {point}: step {step} loads"
        with Saver(run, keep=1) as saver:
            saver.save(step + 1, state(step + 1), {"step": step + 1})
        assert saved_step(run) == step + 1
        assert len(list((run / "checkpoints").iterdir())) == 1, f"point {point}: something is left"
        shutil.rmtree(run)
        if ended == 0:
            return point
    raise AssertionError("a save never ended")


def crash_commits_at_points(folder: Path, saved: int) -> int:
    """The same where the process that commits dies; the one that trains goes on, and is told."""
    command = committer.command
    for point in range(1000):
        run, failed = folder / f"point-{point}", False
        with Saver(run, keep=1) as saver:
            if saved:
                saver.save(saved, state(saved), {"step": saved}, asynchronous=False)
                saver._committer.close()
            committer.command = with_fault("die", point)
            try:
                saver.save(saved + 1, state(saved + 1), {"step": saved + 1}, asynchronous=False)
            except MachineError as error:
                assert "exit code -9" in str(error), f"point {point}: {error}"
                failed = True
            process = saver._committer._process
            survived = not failed and process is not None and process.poll() is None
            committer.command = command
            step = saved_step(run)
            allowed = (0, saved) if failed else (saved + 1,)
            assert step in allowed, f"point {point}: step {step} loads"
            saver._committer.close()
            saver.save(saved + 2, state(saved + 2), {"step": saved + 2})
        assert saved_step(run) == saved + 2
        with Saver(run, keep=1) as saver:
            saver.save(saved + 3, state(saved + 3), {"step": saved + 3})
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == [f"step-{saved + 3:08d}"], f"point {point}: {left} are left"
        shutil.rmtree(run)
        if survived:
            return point
    raise AssertionError("a commit never ended")


def crash_at_random(run: Path, lives: int) -> int:
    """Each life goes on from the newest checkpoint and saves every step, until killed; returns the steps.

    Nothing that was reported as saved is ever lost, and nothing loads wrongly. A life has time for up to four
    saves, as one was timed; where the machine got busier since, there are more and longer ones, until ENOUGH
    is saved.
    """
    draw = random.Random(0)
    began = time.perf_counter()
    with Saver(run.with_name("timed")) as saver:
        for step in range(4):
            saver.save(step, state(step), {})
    seconds = time.perf_counter() - began
    for life in range(4 * lives):
        if life >= lives:
            if saved_step(run) > ENOUGH:
                break
            seconds *= 1.1
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
        time.sleep(draw.uniform(0.0, seconds))
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
        print(crash_at_points(Path(folder), int(rest[0])))
    elif mode == "commit":
        print(crash_commits_at_points(Path(folder), int(rest[0])))
    else:
        print(crash_at_random(Path(folder), int(rest[0])))


if __name__ == "__main__":
    main()
