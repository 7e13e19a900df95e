"""Steps of training are timed on a part of a model that is like the whole, and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colossus.hardware.timings import Setting, Timing
from colossus.measure import training
from colossus.measure.machine import this_machine
from colossus.measure.training import _part, compiled_timings, keep_compiled, step_timings
from tests.derive.machines import machine
from tests.perf.tiny import tiny

SETTINGS = [Setting("fp32", 1), Setting("bf16", 1)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    this_machine()  # measured before the cache is another
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    monkeypatch.setattr(training, "SHAPE_SECONDS", 0.3)
    return tmp_path


def test_a_part_of_a_mixture_has_experts() -> None:
    """DeepSeek-V3's first three layers have none: of one layer that is measured, that one has."""
    arch = tiny("deepseek-v3", num_layers=40, hidden_size=2048)
    part = _part(arch)
    assert part.num_layers == 1 and part.has_experts(0)
    part = _part(tiny("deepseek-v3"))
    assert [part.has_experts(layer) for layer in range(part.num_layers)] == [False, False, True, True]


def test_seconds_are_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over three samples of eight tokens, which takes two seconds here."""
    models = training._Models(tiny("llama3.2-1b"), 8, "adamw", "cpu")
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=iter([5.0, 7.0]).__next__))
    assert models.pass_seconds("fp32", 3, 8) == 2.0 / 24


def test_a_mixture_of_experts_is_timed_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    arch, here = tiny("deepseek-v3"), dataclasses.replace(this_machine())
    found = step_timings(here, arch, 64, SETTINGS, "cpu")
    assert {timing.setting for timing in found} <= set(SETTINGS) and found[0].flops_per_second > 1e6
    assert torch.get_num_threads() == before
    monkeypatch.setattr(training, "time_steps", lambda *_: pytest.fail("it was kept"))
    assert set(step_timings(here, arch, 64, [t.setting for t in found], "cpu")) == set(found)


def test_a_disturbed_timing_is_made_again_and_keeps_the_better(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(quiet: bool, *rates: float):
        made = tuple(Timing(*setting, rate) for setting, rate in zip(SETTINGS, rates, strict=True))
        monkeypatch.setattr(training, "time_steps", lambda *_: training.Timings(64, made, quiet))

    arch = tiny("llama3.2-1b")
    timed(False, 5.0, 9.0)
    step_timings(this_machine(), arch, 64, SETTINGS, "cpu")
    monkeypatch.setattr(training, "DISTURBED_SECONDS", -1.0)
    timed(True, 7.0, 8.0)
    again = step_timings(this_machine(), arch, 64, SETTINGS, "cpu")
    assert [timing.flops_per_second for timing in again] == [7.0, 9.0]
    timed(True, 99.0, 99.0)  # quiet now: not timed again
    assert step_timings(this_machine(), arch, 64, SETTINGS, "cpu") == again


def test_a_hopeless_setting_is_left_after_a_short_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[str, int]] = []
    seconds = {"fp32": 1e-6, "bf16": 130e-6}

    def pass_of(self: object, kind: str, rows: int, seq_len: int) -> float:
        passes.append((kind, rows * seq_len))
        return seconds[kind]

    monkeypatch.setattr(training._Models, "pass_seconds", pass_of)
    monkeypatch.setattr(training._Models, "update_seconds", lambda *_: 1e-7)
    found = training.time_steps(this_machine(), tiny("llama3.2-1b"), 64, SETTINGS, "cpu")
    assert max(tokens for kind, tokens in passes if kind == "bf16") <= training.FIRST_TOKENS
    rates = {timing.type: timing.flops_per_second for timing in found.timings}
    assert rates["fp32"] == pytest.approx(130 * rates["bf16"])


def test_a_machine_elsewhere_is_known_by_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "time_steps", lambda *_: pytest.fail("it is not here"))
    found = step_timings(machine(fp32=1e11, bf16=4e11), tiny("llama3.2-1b"), 64, SETTINGS, "cpu")
    assert [timing.flops_per_second for timing in found] == [0.3e11, 1.2e11]


def test_what_compiling_gained_is_kept_beside_the_rates(cache: Path) -> None:
    arch = tiny("llama3.2-1b")
    (found, *_) = step_timings(this_machine(), arch, 64, SETTINGS[:1], "cpu")
    assert found.gain is None and compiled_timings(this_machine()) == []
    keep_compiled(arch, 64, "cpu", "muon", Timing("fp32", 1, 1.0, gain=1.3, compile_seconds=12.0))
    keep_compiled(arch, 64, "cpu", "muon", Timing("bf16", 2, 1.0, gain=1.1, compile_seconds=11.0))
    seen = {timing.setting: timing for _, timing in compiled_timings(this_machine())}
    assert seen["fp32", 1] == dataclasses.replace(found, gain=1.3, compile_seconds=12.0)
    assert seen["bf16", 2].gain == 1.1
    assert compiled_timings(machine()) == []  # another's: what was gained here says nothing of it


class Scripted:
    """Of each type, the seconds of its passes in turn, the last again and again, and those of an update; the
    clock goes on by so many steps of a thousand tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **passes: list[float]) -> None:
        self.passes, self.updates, self.now = passes, dict.fromkeys(passes, 0.0), 0.0
        self.asked: list[tuple[str, str]] = []
        monkeypatch.setattr(training.time, "perf_counter", lambda: self.now)

    def pass_seconds(self, kind: str, rows: int, seq_len: int) -> float:
        self.asked.append(("pass", kind))
        left = self.passes[kind]
        return self._took(left.pop(0) if len(left) > 1 else left[0])

    def update_seconds(self, kind: str) -> float:
        self.asked.append(("update", kind))
        return self._took(self.updates[kind])

    def _took(self, seconds: float) -> float:
        self.now += 1000 * seconds
        return seconds

    def seconds_per_token(self) -> dict[str, float]:
        trials = [training._Trial(Setting(kind, 1), self) for kind in self.passes]  # type: ignore[arg-type]
        training._take_turns(trials, rows=1, seq_len=32)
        return {trial.setting.type: trial.seconds_per_token for trial in trials}


def test_one_disturbed_pass_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest setting met other work in its first full pass, and is still found."""
    # Two short passes and a first full one that does not count, then a full one that took twice as long.
    scripted = Scripted(monkeypatch, bf16=[1e-5, 1e-5, 1e-5, 2e-5, 1e-5], fp32=[1.3e-5])
    assert scripted.seconds_per_token() == {"bf16": 1e-5, "fp32": 1.3e-5}


def test_updates_count_for_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(monkeypatch, bf16=[1.1e-5], fp32=[1e-5])
    scripted.updates = {"bf16": 1e-6, "fp32": 8e-6}
    found = scripted.seconds_per_token()
    assert found["bf16"] == pytest.approx(1.2e-5) and found["fp32"] == pytest.approx(1.8e-5)


def test_updates_of_what_is_behind_are_not_timed_but_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(monkeypatch, bf16=[1e-5], fp32=[1.5e-5])
    scripted.updates = {"bf16": 2e-6, "fp32": 1.0}
    found = scripted.seconds_per_token()
    assert ("update", "fp32") not in scripted.asked
    assert found["bf16"] == pytest.approx(1.2e-5) and found["fp32"] == pytest.approx(1.8e-5)


def test_where_the_time_is_up_each_has_full_passes_and_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wide model; a pass of a few tokens tells nothing of the rate of many."""
    scripted = Scripted(monkeypatch, bf16=[4e-4, 4e-4, 1e-4, 1e-4], fp32=[3e-4, 3e-4, 1.1e-4, 1.1e-4])
    scripted.updates = {"bf16": 1e-4, "fp32": 3e-4}  # the clock is at 2.0 s of 2.4 s before the first of them
    found = scripted.seconds_per_token()
    assert found["bf16"] == pytest.approx(2e-4) and found["fp32"] == pytest.approx(4.1e-4)
