import json
import re
from html.parser import HTMLParser

import pytest
from made_run import write_run

from colossus.events import EventLog
from colossus.monitor.report import write_report
from colossus.monitor.summary import summary
from colossus.monitor.view import RunView

VOID = {"meta", "br", "link", "img", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(folder) -> tuple[str, str]:
    """The html of a run's report, and its text."""
    html = write_report(folder).read_text()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and not list(folder.glob("*.part"))
    return html, " ".join(parser.text)


def test_a_finished_run_is_told_whole(tmp_path):
    html, text = page(write_run(tmp_path / "run", steps=400))
    for said in (
        *("finished", "bits per byte", "gzip -9", "bz2 -9", "xz -9e", "training steps", "muon"),
        *("Loss", "Learning rate", "Gradient norm", "Waiting for data", "AMD EPYC", "1.31M parameters"),
        "Return the name of the file <name> & its path.",
        "the learning rate falls from step 280 to 400",
        "checkpoints/step-00000400",
    ):
        assert said in text, said
    assert "<name>" not in html  # what the model wrote is text, never markup


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html, _ = page(write_run(tmp_path / "run", steps=200))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|src=", html)


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.6, 0.97])
def test_a_torn_log_gives_a_report_of_what_there_is(tmp_path, cut):
    folder = write_run(tmp_path / "run", steps=200)
    data = (folder / "events.jsonl").read_bytes()
    (folder / "events.jsonl").write_bytes(data[: int(len(data) * cut)])
    _, text = page(folder)
    assert "running, or killed" in text
    assert "colossus train" in summary(folder)


def test_a_run_without_a_log_and_one_without_events(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "not started" in page(tmp_path / "empty")[1]
    (tmp_path / "empty" / "events.jsonl").write_text("")
    assert "No step was taken yet" in page(tmp_path / "empty")[1]
    assert "No step was taken" in summary(tmp_path / "empty")


def test_numbers_that_are_not_finite(tmp_path):
    log = EventLog(tmp_path)
    log.write("start", 0, processor="x")
    bits = dict.fromkeys(("gzip_bits_per_byte", "bz2_bits_per_byte", "xz_bits_per_byte"), 1.5)
    for step, loss in enumerate([4.0, float("nan"), float("inf"), 3.0]):
        log.write("step", step, loss=loss, grad_norm=float("nan"), tokens=8, step_seconds=0.1)
    counts = {"num_documents": 1, "num_bytes": 9, "seconds": 0.1}
    log.write("validation", 4, loss=float("nan"), bits_per_byte=float("nan"), **bits, **counts)
    log.close()
    assert "not finite" in page(tmp_path)[1] and "not finite" in summary(tmp_path)


def test_a_corrected_peak_is_the_one_that_is_shown(tmp_path):
    """Steps from before it was corrected count against it too."""
    log = EventLog(tmp_path)
    log.write("start", 0, peak_flops_per_second=1e9)
    for step in range(40):
        corrected = {"peak_flops_per_second": 4e9 if step < 30 else 5e9} if step >= 25 else {}
        peak = corrected.get("peak_flops_per_second", 1e9)
        log.write("step", step, loss=3.0, tokens=8, step_seconds=0.1, mfu=2e9 / peak, **corrected)
    log.close()
    assert RunView.read(tmp_path).mfu == pytest.approx(0.4)
    html, text = page(tmp_path)
    assert "<b>40%</b><span>MFU, of 5 GFLOP/s</span>" in html
    assert "40%" in summary(tmp_path) and "200%" not in text + summary(tmp_path)


def test_two_attempts_are_marked_and_counted(tmp_path):
    folder = write_run(tmp_path / "run", steps=400, interrupted=True)
    _, text = page(folder)
    for said in ("resumed", "Attempts", "steps taken again after a restart", "stood still for 7 min"):
        assert said in text, said
    view = RunView.read(folder)
    assert [e["step"] for e in view.steps] == list(range(400)) and len(view.repeated) == 57
    assert all(e["attempt"] == 1 for e in view.steps if e["step"] >= 200)


def test_what_a_killed_attempt_took_in_vain_counts_nowhere(tmp_path):
    """Killed at step 257 after a validation at 250, it went on from step 200 and is at 210."""
    folder = write_run(tmp_path / "run", steps=400, interrupted=True)
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    resumed = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "resume")
    (folder / "events.jsonl").write_text("".join(lines[: resumed + 11]))
    view = RunView.read(folder)
    assert view.num_steps == 210 and view.num_tokens == 210 * 2048 and len(view.repeated) == 57
    assert [e["step"] for e in view.validations] == [50, 100, 150, 200] and view.final["step"] == 200
    assert "210 steps, " in summary(folder)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_time_ledger_adds_up(tmp_path, interrupted):
    view = RunView.read(write_run(tmp_path / "run", steps=300, interrupted=interrupted))
    shares = view.time_ledger()
    assert sum(share.seconds for share in shares) == pytest.approx(view.run_seconds, abs=0.5)
    compiling = next(share.seconds for share in shares if share.name.startswith("first steps"))
    assert compiling == pytest.approx(6.5 * (1 + interrupted), abs=0.4)


def test_a_long_run_makes_a_small_page_quickly(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, steps=20_000)
    html, _ = page(folder)
    assert len(html) < 400_000


def test_a_validation_of_all_documents_is_a_point_by_itself(tmp_path):
    html, text = page(write_run(tmp_path / "run", steps=400))
    assert text.count("all held-out documents") == 2 and text.count("a part of the held-out documents") == 2
    for title, joined in (("Loss", 3), ("Bits per byte", 1)):  # each step, smoothed and the part; the part
        figure = html.partition(f"<b>{title}</b>")[2].partition("</figure>")[0]
        lines = re.findall(r'<polyline class="([^"]*)" points="([^"]*)"', figure)
        assert len(lines) == joined and lines[-1][0] == "two dots"
        assert (
            len(lines[-1][1].split()) == 7 and '<i class="dot four dots loose" style="left:100.00%' in figure
        )


def test_the_data_under_the_pointer_is_json(tmp_path):
    html, _ = page(write_run(tmp_path / "run", steps=200))
    plots = re.findall(r'data-plot="([^"]*)"', html)
    assert len(plots) == 6
    for plot in plots:
        data = json.loads(plot.replace("&quot;", '"'))
        assert all(len(line["x"]) == len(line["y"]) for line in data["lines"])


def test_the_summary_says_what_it_reached_and_what_to_try_next(tmp_path):
    text = summary(write_run(tmp_path / "run", steps=400))
    for said in (
        "> this model",
        "xz -9e",
        "fewer bits",
        "400 steps",
        "MFU 5",
        "def _get_name",
        "report.html",
    ):
        assert said in text, said
    assert f"colossus generate {tmp_path / 'run'} 'def '" in text
    assert max(map(len, text.splitlines())) <= 130
