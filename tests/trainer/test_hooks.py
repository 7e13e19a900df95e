"""A user's hooks, and how a run is asked to stop: in its own process and through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints.find import latest
from colossus.errors import MachineError
from colossus.job import Job, to_toml
from colossus.trainer import folder as folders
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.stop import SAME_SECONDS
from colossus.trainer.run import Run
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from tests.trainer.conftest import Reached
from tests.trainer.running import SECONDS, kept_machine, run_of

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Job]


class Tell(Hook):
    """Writes down each call."""

    def __init__(self, name: str, calls: list[tuple[str, str, int]]) -> None:
        self.name, self.calls = name, calls

    def on_start(self, training: Training) -> None:
        self.calls.append((self.name, "start", training.step))

    def before_step(self, training: Training) -> None:
        self.calls.append((self.name, "before", training.step))

    def after_step(self, training: Training, result: StepResult) -> None:
        assert result.step == training.step - 1
        self.calls.append((self.name, "after", training.step))

    def on_finish(self, training: Training) -> None:
        self.calls.append((self.name, "finish", training.step))


class Act(Hook):
    """Calls `act` before step `step`."""

    def __init__(self, step: int, act: Callable[[Training], Any]) -> None:
        self.step, self.act = step, act

    def before_step(self, training: Training) -> None:
        if training.step == self.step:
            self.act(training)


def test_hooks_are_called_in_order(small_job: Make) -> None:
    calls: list[tuple[str, str, int]] = []
    api.train(small_job("run", "run.steps=2"), [Tell("a", calls), Tell("b", calls)])
    steps = [
        (name, kind, n) for n in range(2) for kind, n in (("before", n), ("after", n + 1)) for name in "ab"
    ]
    begin, end = [("a", "start", 0), ("b", "start", 0)], [("b", "finish", 2), ("a", "finish", 2)]
    assert calls == [*begin, *steps, *end]


def test_listeners_hear_every_event_that_is_written(small_job: Make) -> None:
    heard: list[dict[str, Any]] = []
    run = api.train(small_job("run", "run.steps=2"), listeners=[heard.append])
    assert [e["kind"] for e in heard] == [e["kind"] for e in run.events()]


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_saving(number: signal.Signals, small_job: Make) -> None:
    job = small_job("run", "checkpoint.steps=0", "run.steps=40")
    before = signal.getsignal(number)
    run = api.train(job, [Act(7, lambda training: os.kill(os.getpid(), number))])
    assert run.outcome == number.name
    assert max(run.loss) == 7  # the step in progress was finished
    assert [e["saved_step"] for e in run.events("checkpoint")] == [8]
    assert signal.getsignal(number) is before
    assert api.train(job).outcome == "finished"
    assert run.events("resume")[0]["step"] == 8 and sorted(run.loss) == list(range(40))


@pytest.mark.usefixtures("signals")
def test_a_signal_in_a_validation_gives_it_up(small_job: Make) -> None:
    job = small_job("run", "checkpoint.steps=0")

    def while_evaluating(training: Training) -> None:
        def ask(*_: Any) -> None:
            if not training.state.model.training and training.stop_asked is None:
                os.kill(os.getpid(), signal.SIGTERM)

        training.state.model.register_forward_pre_hook(ask)

    run = api.train(job, [Act(0, while_evaluating)])
    assert run.outcome == "SIGTERM" and max(run.loss) == 4
    assert run.events("validation") == [] and [e["saved_step"] for e in run.events("checkpoint")] == [5]
    assert api.train(job).outcome == "finished"


@pytest.mark.usefixtures("signals")
def test_a_signal_in_the_first_step_ends_it_there(small_job: Make) -> None:
    """It may compile for a minute. Weights that may be half updated are not saved."""
    job = small_job("run")

    def in_the_step(training: Training) -> None:
        training.state.model.norm.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))

    run = api.train(job, [Act(0, in_the_step)])
    assert run.outcome == "SIGINT" and run.loss == {} and run.events("checkpoint") == []
    assert not run.is_saved
    assert api.train(job).outcome == "finished" and sorted(run.loss) == list(range(12))


@pytest.mark.usefixtures("signals")
def test_a_signal_amid_the_passes_of_a_step_leaves_it_to_the_next_attempt(small_job: Make) -> None:
    """A step may take minutes, for which a rank that is alone need not wait. It goes on as a run that never
    stopped."""
    words = ["layout.micro_batch=1", "checkpoint.steps=0", "optimizer.name=muon", "run.validate_every=0"]
    job, whole = small_job("run", *words), small_job("whole", *words)
    passes = []

    def in_the_second_pass(training: Training) -> None:
        def ask(*_: Any) -> None:
            passes.append(training.step)
            if passes.count(7) == 2 and training.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

        training.state.model.register_forward_pre_hook(ask)

    run = api.train(job, [Act(0, in_the_second_pass)])
    assert run.outcome == "SIGINT" and max(run.loss) == 6 and passes.count(7) == 2
    assert run.events("checkpoint")[-1]["saved_step"] == 7
    assert api.train(job).outcome == "finished"
    assert run.loss == api.train(whole).loss


@pytest.mark.usefixtures("signals")
def test_a_second_signal_ends_the_process_at_once(small_job: Make) -> None:
    job = small_job("run", "checkpoint.steps=0")

    def twice(training: Training) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # of the same wish: a launcher's and a terminal's
        time.sleep(SAME_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Reached, match="SIGINT"):
        api.train(job, [Act(3, twice)])
    assert run_of(job).outcome == "unfinished" and max(run_of(job).loss) == 1  # of step 2 none has read yet
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_is_no_second_wish(small_job: Make) -> None:
    """Schedulers send it again before they kill, while the run may still save."""
    job = small_job("run", "checkpoint.steps=0")

    def thrice(training: Training) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SAME_SECONDS / 2 + 0.1)

    run = api.train(job, [Act(3, thrice)])
    assert run.outcome == "SIGTERM" and run.is_saved
    assert [e["saved_step"] for e in run.events("checkpoint")] == [4]


def test_an_error_gives_the_signals_back(small_job: Make) -> None:
    def fail(training: Training) -> None:
        raise MachineError("a hook's")

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(MachineError, match="a hook's"):
        api.train(small_job("run"), [Act(3, fail)])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


class Command:
    """`colossus train` on a job, in a process of its own."""

    def __init__(self, job: Job, file: Path) -> None:
        file.write_text(to_toml(job))
        self.run = run_of(job)
        environment = os.environ | {"COLOSSUS_CACHE": kept_machine(), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "colossus", "train", str(file), f"run.folder={job.run.folder}"]
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, kind: str, count: int = 1) -> None:
        end = time.monotonic() + SECONDS
        while len(self.run.events(kind)) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[[Job], Command]]:
    started: list[Command] = []

    def start(job: Job) -> Command:
        started.append(Command(job, tmp_path / "asked.toml"))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.mark.parametrize(("number", "code", "ranks"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_the_command_saves_and_tells_by_its_exit_code(
    number: signal.Signals, code: int, ranks: int, small_job: Make, command: Callable[[Job], Command]
) -> None:
    """With two ranks the signal goes to the process that started them."""
    settings = ["run.steps=100000", "checkpoint.steps=0", "run.validate_every=50"]
    job = small_job("run", *settings, f"layout.dp_shard={ranks}")
    running = command(job)
    running.wait_for("step", 3)
    if ranks == 1:
        refused = command(job)
        assert refused.end()[0::2] == (
            2,
            f"error: run.folder={job.run.folder}: process {running.process.pid} is training in it; "
            "wait for it or stop it\n",
        )
    running.process.send_signal(number)
    sent = time.monotonic()
    returned, out, err = running.end()
    assert returned == code, (out, err)
    assert time.monotonic() - sent < 30
    run = Run(Path(job.run.folder))
    assert run.outcome == number.name
    saved = latest(run.folder)
    assert saved is not None and saved.name == f"step-{max(run.loss) + 1:08}"
    assert "Traceback" not in err


def test_a_signal_before_the_ranks_begin(small_job: Make, command: Callable[[Job], Command]) -> None:
    """Nothing was saved: 143 would say that something was."""
    job = small_job("run", "run.steps=100000", "layout.dp_shard=2")
    running = command(job)
    end = time.monotonic() + SECONDS
    while not (Path(job.run.folder) / "job.toml").is_file():
        assert running.process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    running.process.send_signal(signal.SIGTERM)
    returned, _, err = running.end()
    assert returned == 3
    assert err == "error: stopped by SIGTERM without saving; what was saved before is whole\n"
    assert running.run.events("step") == [] and running.run.outcome == "unfinished"


def test_ranks_save_and_end_when_their_parent_is_killed(
    small_job: Make, command: Callable[[Job], Command]
) -> None:
    """Else they would go on unseen, and hold the folder."""
    settings = ["run.steps=100000", "checkpoint.steps=0", "run.validate_every=0"]
    job = small_job("run", *settings, "layout.dp_shard=2")
    running = command(job)
    running.wait_for("step", 3)
    folder = Path(job.run.folder)
    first_rank = int((folder / "lock").read_text())
    assert first_rank != running.process.pid
    running.process.kill()
    end = time.monotonic() + 30
    while is_alive(first_rank):
        assert time.monotonic() < end
        time.sleep(0.05)
    run = Run(folder)
    assert run.outcome == "SIGTERM"
    assert run.events("checkpoint")[-1]["saved_step"] == max(run.loss) + 1
    with folders.locked(folder):
        pass


def is_alive(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
