"""What is said of a run at its end."""

import re

import pytest
from made_run import BZ2, GZIP, XZ

from colossus.events import EventLog
from colossus.monitor import phrases
from colossus.monitor.report import render
from colossus.monitor.summary import summary, verdict
from colossus.monitor.view import RunView

BITS = {"gzip_bits_per_byte": GZIP, "bz2_bits_per_byte": BZ2, "xz_bits_per_byte": XZ}


def run_with(folder, *validations):
    """A run that was scored so: (step, whole, bits per byte)."""
    log = EventLog(folder)
    log.write("start", 0, processor="x")
    counts = {"num_documents": 3, "num_bytes": 900, "seconds": 0.1, "loss": 1.0}
    for step, whole, bits in validations:
        log.write("validation", step, whole=whole, bits_per_byte=bits, **BITS, **counts)
    log.write("end", 9, reason="finished")
    log.close()
    return RunView.read(folder)


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (XZ * 0.75, "25% fewer bits than the best compressor needs, on text that the model never saw."),
        ((XZ + BZ2) / 2, "On text that it never saw, the model does better than gzip -9 and bz2 -9."),
        ((BZ2 + GZIP) / 2, "On text that it never saw, the model does better than gzip -9."),
        (GZIP, "On text that it never saw, the compressors still do better: the model wants more training."),
    ],
)
def test_the_verdict_is_against_the_best_compressor_that_it_beats(tmp_path, bits, said):
    assert verdict(run_with(tmp_path, (9, True, bits))) == said


def scored(folder, *validations, documents=3, text=900):
    """A run with a step, that was scored so: (step, bits per byte), on all of so many documents."""
    folder.mkdir()
    log = EventLog(folder)
    log.write("start", 0, processor="x")
    log.write("step", 0, loss=1.0, tokens=8, step_seconds=0.1)
    counts = {"num_documents": documents, "num_bytes": text, "seconds": 0.1, "loss": 1.0}
    for step, bits in validations:
        log.write("validation", step, whole=True, bits_per_byte=bits, **BITS, **counts)
    log.write("end", 9, reason="finished")
    log.close()
    return RunView.read(folder)


def test_a_tuned_model_is_held_against_itself_before(tmp_path):
    view = scored(tmp_path / "a", (0, 1.25), (9, 1.0))
    assert verdict(view) == "20% fewer bits than before tuning, on text that the model never saw."
    for page in (summary(tmp_path / "a"), render(view)):
        assert "before tuning" in page and "1.250" in page and "gzip -9" in page
    worse = scored(tmp_path / "b", (0, 1.0), (9, 1.5))
    assert verdict(worse) == "50% more bits than before tuning, on text that the model never saw."
    assert scored(tmp_path / "c", (9, 1.5)).before is None
    assert scored(tmp_path / "d", (0, 1.5)).before is None  # nothing came after it


@pytest.mark.parametrize("model", [{}, {"init_from": "runs/x"}])
def test_the_report_of_a_tuned_model_counts_no_tokens_a_parameter(tmp_path, model):
    """It has seen others before."""
    log = EventLog(tmp_path)
    log.write("start", 0, processor="x", num_parameters=4, job={"model": model, "data": {"corpus": ["c"]}})
    log.write("step", 0, loss=1.0, tokens=8, step_seconds=0.1)
    log.close()
    page = render(RunView.read(tmp_path))
    assert ("2.0 a parameter" in page) is (not model)
    assert f"4 parameters, {'tuned' if model else 'trained'} on c" in page


def test_steps_and_tokens_of_a_branch_are_its_own(tmp_path):
    """Its weights have seen more than these tokens."""
    log = EventLog(tmp_path)
    log.write("start", 0, processor="x", num_parameters=4, job={"model": {}, "data": {"corpus": ["c"]}})
    for step in (16, 17, 18):
        log.write("step", step, loss=1.0, tokens=8, step_seconds=0.1)
    log.close()
    assert "3 steps on from step 16, 24 tokens in " in summary(tmp_path)
    page = render(RunView.read(tmp_path))
    assert "steps, on from step 16" in page and "a parameter" not in page


@pytest.mark.parametrize(("text", "compared"), [(3 * 256, True), (3 * 256 - 1, False), (3 * 70, False)])
def test_short_answers_are_held_against_no_compressor(tmp_path, text, compared):
    """Of 70 bytes gzip makes 83: that says nothing of the model."""
    view = scored(tmp_path / "a", (9, 1.5), text=text)
    for page in (summary(tmp_path / "a"), render(view), phrases.of(view.final)):
        assert ("gzip" in page) is compared and ("xz" in page) is compared
    if not compared:
        assert verdict(view) == "The documents are too short for a compressor to be held against."


def test_the_last_score_of_all_documents_counts(tmp_path):
    view = run_with(tmp_path, (3, False, 1.9), (5, True, 1.8), (9, True, 1.7), (9, False, 1.2))
    assert view.final["bits_per_byte"] == 1.7
    assert re.search(r"> this model +1\.700 ", summary(tmp_path))


def test_the_longest_bar_is_the_largest_value(tmp_path):
    """The model at 0.801 has half of gzip's."""
    html = render(run_with(tmp_path, (9, True, GZIP / 2)))
    bars = re.findall(r'<span>([^<]*)</span><div class="track"><i style="--w:([\d.]+)%"', html)
    assert dict(bars) == {
        "this model": "50.0",
        "xz -9e": f"{100 * XZ / GZIP:.1f}",
        "bz2 -9": f"{100 * BZ2 / GZIP:.1f}",
        "gzip -9": "100.0",
    }


def test_how_long_a_save_stopped_training_is_told_apart(tmp_path):
    event = {"kind": "checkpoint", "step": 4, "path": "checkpoints/step-00000004", "bytes": 2_000_000}
    said = phrases.of(event | {"seconds": 12.4, "blocked_seconds": 0.25})
    assert said == ("step 4: saved checkpoints/step-00000004, 2 MB in 12 s; training stood still for 0.25 s")


def test_the_ledger_of_a_short_run(tmp_path):
    """Ten steps of a second, the first of five: three more than twice the usual one went into compiling."""
    log = EventLog(tmp_path)
    log.write("start", 0, processor="x")
    for step in range(10):
        seconds = 5.0 if step == 0 else 1.0
        log.write("step", step, loss=1.0, tokens=8, step_seconds=seconds, data_wait_seconds=0.5)
    log.write("validation", 10, loss=1.0, bits_per_byte=1.0, whole=True, seconds=2.0, **BITS)
    log.write("checkpoint", 10, path="x", blocked_seconds=0.25, seconds=9.0)
    log.close()
    view = RunView.read(tmp_path)
    assert {share.name: share.seconds for share in view.time_ledger()} == {
        "training steps": 11.0,
        "first steps: compiling, warming up": 3.0,
        "waiting for data": 5.0,
        "validation": 2.0,
        "saving, while training stood still": 0.25,
    }


def test_a_figure_that_is_withheld(tmp_path):
    """Of a tokenizer that loses text, in the summary, in the log's words and in the report."""
    log = EventLog(tmp_path)
    counts = {"num_documents": 3, "num_bytes": 999, "seconds": 1.0, "loss": 0.5}
    log.write("start", 0, processor="x")
    log.write("validation", 1, whole=True, bits_per_byte=None, lost=0.054, **BITS, **counts)
    log.close()
    assert '<div class="big">no</div>' in render(RunView.read(tmp_path))
    said = summary(tmp_path)
    assert "No bits per byte: the tokenizer loses 5.4% of the text" in said and "this model" not in said
    (tmp_path / "short").mkdir()
    log = EventLog(tmp_path / "short")  # of text that is too short for a compressor, too
    log.write("start", 0, processor="x")
    log.write("validation", 9, whole=True, bits_per_byte=None, lost=0.5, **BITS, **counts | {"num_bytes": 9})
    log.close()
    assert summary(tmp_path / "short").startswith("No bits per byte: the tokenizer loses 50% of the text")
    event = RunView.read(tmp_path).final
    assert "no bits per byte (the tokenizer loses 5.4% of the text) on all 3" in phrases.of(event)
    little = event | {"bits_per_byte": 1.25, "lost": 0.0002}
    assert "1.250 bits per byte (the tokenizer loses <0.1% of the text) on all 3" in phrases.of(little)
