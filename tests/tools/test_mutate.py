"""Every mutation applies to the code as it is; the tool finds which tests run a line, and what they notice.

The latter in a small tree with faults of its own, where all that the tool starts is real.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SOURCE = """import time

LIMIT = 3


def least(numbers):
    return min(numbers)


def wait():
    while LIMIT > 3:
        time.sleep(1)
    return LIMIT


def unused():
    return 1
"""
TESTS = """import subprocess
import sys

from colossus.room.thing import least, wait


def test_least_of_one():
    assert least([4]) == 4


def test_least_in_another_process():
    code = "from colossus.room.thing import least; assert least([4, 2]) == 2"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wait():
    assert wait()


def test_that_fails_anyhow():
    assert least([1]) == 2
"""
FAULTS = """[least-is-most]
file = "room/thing.py"
old = 'min(numbers)'
new = 'max(numbers)'
harm = "the wrong one"

[waits-for-ever]
file = "room/thing.py"
old = 'LIMIT > 3'
new = 'LIMIT > 2'
harm = "nothing goes on"

[not-noticed]
file = "room/thing.py"
old = 'return 1'
new = 'return 2'
harm = "none calls it"
accepted = "none calls it"
"""


def tool() -> ModuleType:
    """A fresh one, so that a test can set its places."""
    spec = importlib.util.spec_from_file_location("mutate", TOOLS / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> ModuleType:
    """The tool in a tree of one source file, one test file and three faults."""
    made = tool()
    made.ROOT, made.DATA = tmp_path / "tree", tmp_path / "tree" / "tools" / "mutations"
    made.KEPT, made.PAGE = made.ROOT / ".mutations", made.ROOT / "page.md"
    made.LIMIT_SECONDS = made.WITHOUT_MAP_SECONDS = 8.0
    files = {
        "colossus/__init__.py": "",
        "colossus/room/thing.py": SOURCE,
        "tests/room/test_thing.py": TESTS,
        "tools/mutations/room.toml": FAULTS,
        "page.md": f"above\n{made.BEGIN}\nold\n{made.END}\nbelow\n",
    }
    for name, text in files.items():
        (made.ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (made.ROOT / name).write_text(text)
    shutil.copytree(TOOLS / "recording", made.ROOT / "tools" / "recording")
    return made


def test_every_mutation_applies() -> None:
    mutate = tool()
    mutations = mutate.load()
    assert mutate.wrong(mutations) == []
    assert len(mutations) >= 300


def test_rooms_have_mutations_in_proportion_to_their_lines() -> None:
    mutate = tool()
    mutations = mutate.load()
    counts = Counter(mutation.room for mutation in mutations)
    rooms = [folder.name for folder in (mutate.ROOT / "colossus").iterdir() if any(folder.glob("*.py"))]
    assert counts.keys() == {*rooms, "root"}
    lines = {room: mutate._num_lines(room) for room in counts}
    share = len(mutations) / sum(lines.values())
    for room, count in counts.items():
        assert 0.5 < (count + 1) / (share * lines[room] + 1) < 2, f"{room}: {count} for {lines[room]} lines"


def test_a_file_s_own_tests_may_stand_in_a_folder_above() -> None:
    mutate = tool()
    for file, own in (
        ("trainer/hooks/log.py", "trainer/test_log.py"),
        ("models/hf/families.py", "models/hf/test_families.py"),
        ("cli/none.py", "cli/test_none.py"),
    ):
        assert mutate.mirrored(f"colossus/{file}") == f"tests/{own}"


def test_a_mutation_that_does_not_apply_is_named(tree: ModuleType) -> None:
    assert tree.wrong(tree.load()) == []
    (tree.ROOT / "colossus/room/thing.py").write_text(SOURCE.replace("min(numbers)", "sorted(numbers)[0]"))
    assert tree.wrong(tree.load()) == ["least-is-most: colossus/room/thing.py has 0 times 'min(numbers)'"]
    with pytest.raises(ValueError, match="least-is-most"):
        tree.load()[0].apply(SOURCE * 2)
    assert tree.main(["run"]) == 1


def test_its_lines_are_those_that_it_replaces(tree: ModuleType) -> None:
    assert [list(mutation.lines(SOURCE)) for mutation in tree.load()] == [[7], [11], [17]]


@pytest.mark.parametrize("mapped", [True, False], ids=["by-a-map", "without-a-map"])
def test_what_is_noticed_by_which_test(tree: ModuleType, mapped: bool) -> None:
    file = "tests/room/test_thing.py"
    if mapped:
        assert tree.main(["map"]) == 1  # a test fails anyhow
        (recorded,) = tree.read_map()
        by_test = recorded.lines["colossus/room/thing.py"]
        assert by_test[f"{file}::test_wait"] == [10, 11, 13]
        assert by_test[f"{file}::test_least_in_another_process"] == [1, 3, 6, 7, 10, 16]
        assert f"{file}::test_that_fails_anyhow" not in recorded.seconds
        mutation = tree.load()[0]
        tests, _ = tree.chosen_tests(mutation, SOURCE, [recorded])
        assert tests == [f"{file}::test_least_of_one", f"{file}::test_least_in_another_process"]
    assert tree.main(["run"]) == 0
    found = tree.results()
    assert {name: result.outcome for name, result in found.items()} == {
        "least-is-most": "noticed",
        "waits-for-ever": "timeout",
        "not-noticed": "survived",
    }
    assert found["least-is-most"].by == f"{file}::test_least_in_another_process"
    assert (tree.ROOT / "colossus/room/thing.py").read_text() == SOURCE
    before = (tree.DATA / "results.jsonl").read_text()
    assert tree.main(["run"]) == 0  # all have a result
    assert (tree.DATA / "results.jsonl").read_text() == before
    assert tree.main(["table"]) == 0
    page = tree.PAGE.read_text()
    assert page.startswith("above\n") and page.endswith("below\n") and "old" not in page
    assert "| all | 17 | 3 | 2 | 1 | 1 | 0 |" in page
    assert "- `not-noticed` (none calls it): none calls it" in page
    json.loads(before.splitlines()[0])


def test_what_a_killed_process_left_unfinished_is_left_out(tree: ModuleType, tmp_path: Path) -> None:
    raw = tmp_path / "rows"
    said = {"test": "t", "stage": "call", "lines": {"colossus/room/thing.py": [3, 2]}}
    went = {"test": "t", "stage": "call", "seconds": 0.5, "passed": True}
    raw.write_text(f'\n{json.dumps(said)}\n\n{{"test": "t", "sta\n{json.dumps(went)}\n')
    recorded = tree._read("tests/room/test_thing.py", raw)
    assert recorded.lines == {"colossus/room/thing.py": {"t": [2, 3]}}
    assert recorded.seconds == {"t": 0.5}


def test_recorded_tests_that_are_gone_notice_nothing(tree: ModuleType) -> None:
    """Of a function all cases are run where one has another name by now."""
    assert tree._without(
        ["a.py::f[1]", "a.py::f[2]", "a.py::g", "b.py::h"], ["/x/a.py::f", "/x/b.py::h"]
    ) == [
        "a.py::f",
        "a.py::g",
    ]
    assert tree.main(["map"]) == 1
    (recorded,) = tree.read_map()
    file = tree.ROOT / "tests/room/test_thing.py"
    file.write_text(file.read_text().replace("def test_least", "def test_most"))
    trial = tree.Trial(tree.Copy(tree.ROOT.parent / "copy"), [recorded])
    assert trial.attempt(tree.load()[0]).outcome == "survived"
