import re

from made_run import write_run

from colossus.events import read_events
from colossus.monitor.log import LogText


def write_log(folder, events):
    log = LogText(folder)
    for event in events:
        log.show(event)


def test_a_log_reads_like_the_plain_output_with_times(tmp_path):
    write_log(tmp_path, read_events(write_run(tmp_path, steps=400)))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"2026-09-21 \d\d:\d\d:\d\dZ  \S", line) for line in lines)
    steps = [line for line in lines if "tokens/s" in line]
    assert 5 <= len(steps) <= 9 and "step 1  loss" in steps[0] and "MFU 5" in steps[-1]
    assert "training on AMD EPYC" in lines[1] and "finished after 400 steps" in lines[-1]


def test_the_next_attempt_appends(tmp_path):
    events = read_events(write_run(tmp_path, steps=400, interrupted=True))
    for attempt in (0, 1):
        write_log(tmp_path, [e for e in events if e["attempt"] == attempt])
    text = (tmp_path / "log.txt").read_text()
    assert text.index("training on") < text.index("going on from step 200") < text.index("finished")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "log.txt").mkdir()
    write_log(tmp_path, read_events(write_run(tmp_path, steps=40)))
    assert list((tmp_path / "log.txt").iterdir()) == []
