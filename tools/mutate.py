"""Puts faults into the code, one at a time, and asks the tests whether they notice.

The faults are data (tools/mutations/ROOM.toml): a file, the text that goes, the text that comes, what a user
would suffer; and of one that the tests don't notice, why that is accepted.

    python tools/mutate.py check                   does every mutation still apply?
    python tools/mutate.py map [TEST FILE ...]     which tests run which lines; of all files that lack it
    python tools/mutate.py run [ID or ROOM ...]    of all that have no result yet
    python tools/mutate.py table                   into docs/development.md

`map` and `run` go on where they were stopped: the map is kept in .mutations/, what was found of each mutation
in tools/mutations/results.jsonl, which belongs to the repository.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tools" / "mutations"
KEPT = ROOT / ".mutations"
PAGE = ROOT / "docs" / "development.md"
BEGIN, END = "<!-- mutations: written by tools/mutate.py table -->", "<!-- end of mutations -->"
LEFT_OUT = (".git", ".venv", ".mutations", ".mypy_cache", ".ruff_cache", ".hypothesis", "runs", "shared")
BUDGET_SECONDS = 150.0  # of tests for a mutation, as they took when they were recorded
LIMIT = 4.0  # times what the tests take, until one counts as hanging,
LIMIT_SECONDS = 90.0  # and this in any case
WITHOUT_MAP_SECONDS = 600.0
QUIET = "ignore:Module already imported"  # of the recorder, which every process has from its start


@dataclass(frozen=True)
class Mutation:
    """old stands once in colossus/`file`. harm: what a user suffers. accepted: why no test is to notice."""

    name: str
    room: str
    file: str
    old: str
    new: str
    harm: str
    accepted: str = ""

    @property
    def path(self) -> str:
        return f"colossus/{self.file}"

    def apply(self, text: str) -> str:
        """The text of the file with the fault in it.

        Raises:
            ValueError: where the text that goes doesn't stand there once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.path} has {count} times {self.old!r}")
        return text.replace(self.old, self.new)

    def lines(self, text: str) -> range:
        """Those that the fault replaces."""
        first = text.count("\n", 0, text.index(self.old)) + 1
        return range(first, first + self.old.rstrip("\n").count("\n") + 1)

    def key(self, text: str) -> str:
        """Of a result: it holds for this file as it is."""
        return hashlib.sha256("\0".join((text, self.old, self.new)).encode()).hexdigest()[:16]


def load() -> list[Mutation]:
    """All mutations, room by room."""
    found = []
    for file in sorted(DATA.glob("*.toml")):
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        found += [Mutation(name, file.stem, **fields) for name, fields in table.items()]
    return found


def wrong(mutations: Sequence[Mutation]) -> list[str]:
    """What keeps mutations from being tried: one line each."""
    said = []
    meant: dict[str, str] = {}  # of each file
    names = [mutation.name for mutation in mutations]
    said += [
        f"{name}: two mutations of this name" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for mutation in mutations:
        path = ROOT / mutation.path
        if not path.is_file():
            said.append(f"{mutation.name}: no file {mutation.path}")
            continue
        text = path.read_text(encoding="utf-8")
        try:
            changed = mutation.apply(text)
            if mutation.path not in meant:
                meant[mutation.path] = ast.dump(ast.parse(text))
            if ast.dump(ast.parse(changed)) == meant[mutation.path]:
                said.append(f"{mutation.name}: changes nothing")
        except (ValueError, SyntaxError) as error:
            said.append(f"{mutation.name}: {error}" if isinstance(error, SyntaxError) else str(error))
    return said


# --- the map -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What one test file was seen to do. lines: by source file, of each test; of setups by ""."""

    file: str
    seconds: dict[str, float]  # of each test that passed, without what it shares with others
    setup_seconds: float
    lines: dict[str, dict[str, list[int]]]

    def tests_on(self, path: str, lines: Iterable[int]) -> set[str]:
        """Those that ran one of the lines, or may have used what ran them before the first test."""
        wanted, by_test = set(lines), self.lines.get(path, {})
        found = {test for test, there in by_test.items() if wanted & set(there)}
        return {*self.seconds} if "" in found else found & self.seconds.keys()


def record(file: str, out: Path) -> bool:
    """Runs a test file with every process recorded. Whether its tests passed."""
    raw = out.with_suffix(".raw")
    raw.unlink(missing_ok=True)
    paths = [str(ROOT / "tools" / "recording"), str(ROOT)]
    environment = os.environ | {"COLOSSUS_LINES": str(raw), "PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.call(pytest(file, "-p", "recorder", "-W", QUIET), cwd=ROOT, env=environment)
    if code not in (0, 1, 5) or not raw.is_file():
        return code == 5
    recorded = _read(file, raw)
    tree = {"seconds": recorded.seconds, "setup_seconds": recorded.setup_seconds, "lines": recorded.lines}
    out.write_text(json.dumps(tree, separators=(",", ":")))
    raw.unlink()
    return code == 0


def _read(file: str, raw: Path) -> Recorded:
    lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    seconds: dict[str, float] = defaultdict(float)
    setups, failed = [0.0], set[str]()
    for row in _rows(raw):
        if "lines" in row:
            test = "" if row["stage"] == "setup" or not row["test"] else row["test"]
            for path, found in row["lines"].items():
                lines[path][test].update(found)
        elif not row["passed"]:
            failed.add(row["test"])  # skipped ones too: they notice nothing
        elif row["stage"] == "setup":
            setups.append(row["seconds"])
        else:
            seconds[row["test"]] += row["seconds"]
    return Recorded(
        file,
        {test: round(taken, 3) for test, taken in seconds.items() if test not in failed},
        round(max(setups), 3),
        {path: {test: sorted(found) for test, found in tests.items()} for path, tests in lines.items()},
    )


def _rows(raw: Path) -> Iterator[dict[str, Any]]:
    """What processes wrote whole: one that is killed may leave a part of a line."""
    for line in filter(None, raw.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def read_map() -> list[Recorded]:
    """All that was recorded."""
    found = []
    for path in sorted((KEPT / "map").glob("*.json")):
        file = path.stem.replace("__", "/") + ".py"
        if (ROOT / file).is_file():
            found.append(Recorded(file, **json.loads(path.read_text())))
    return found


def test_files() -> list[str]:
    """All of them."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


# --- which tests -------------------------------------------------------------------------------------------


def mirrored(path: str) -> str:
    """The test file that a source file's own tests stand in: in the folder of the same name, else the nearest
    one above; whether there is one or not."""
    inner = Path("tests") / Path(path).relative_to("colossus")
    inner = inner.with_name(f"test_{inner.name}")
    above = (folder / inner.name for folder in inner.parents[:-2])
    return str(next((file for file in above if (ROOT / file).is_file()), inner))


def chosen_tests(
    mutation: Mutation, text: str, recorded: Sequence[Recorded], budget: float = BUDGET_SECONDS
) -> tuple[list[str], float]:
    """The tests that run the lines, the likeliest to notice first, and the seconds that they take.

    First those of the mirrored file, then those of its folder, then the others: in each the quickest first.
    Lines that run at import alone (constants, fields) are looked after by the tests of the file's others.
    """
    own = mirrored(mutation.path)
    folder = str(Path(own).parent) + "/"
    for lines in (mutation.lines(text), range(1, text.count("\n") + 2)):
        rows = []
        for of_file in recorded:
            near = 0 if of_file.file == own else 1 if of_file.file.startswith(folder) else 2
            for test in of_file.tests_on(mutation.path, lines):
                rows.append((near, of_file.seconds[test], test, of_file))
        if rows:
            break
    tests, total, begun = list[str](), 0.0, set[str]()
    for _, seconds, test, of_file in sorted(rows, key=lambda row: row[:3]):
        cost = seconds + (0.0 if of_file.file in begun else of_file.setup_seconds)
        if tests and total + cost > budget:
            continue
        begun.add(of_file.file)
        tests.append(test)
        total += cost
    return tests, total


def tests_without_map(mutation: Mutation) -> list[str]:
    """The mirrored test file, and the test folder of the room."""
    own = ROOT / mirrored(mutation.path)
    paths = [own] if own.is_file() else []
    folder = next(folder for folder in own.parents if folder.is_dir())
    if folder != ROOT / "tests" or not paths:
        paths += [path for path in sorted(folder.glob("test_*.py")) if path != own]
    return [str(path.relative_to(ROOT)) for path in paths]


# --- trying ------------------------------------------------------------------------------------------------


def pytest(*arguments: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]


class Copy:
    """A copy of the tree, in which one mutation at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT, "__pycache__"), symlinks=True)
        self._written = time.time()

    def write(self, path: str, text: str) -> None:
        """With another time of change than ever before: Python's own copies go by it, in whole seconds."""
        (self.folder / path).write_text(text, encoding="utf-8")
        self._written += 2
        os.utime(self.folder / path, (self._written, self._written))

    def test(self, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
        """pytest's exit code, None where it took too long, and what it printed."""
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        environment.pop("PYTEST_CURRENT_TEST", None)
        process = subprocess.Popen(
            pytest("-x", "--tb=line", *tests),
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            self._end(process)

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Ends what still runs in this copy, ranks in sessions of their own too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for place in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if place.readlink().is_relative_to(self.folder):
                    os.kill(int(place.parent.name), signal.SIGKILL)


@dataclass(frozen=True)
class Result:
    """outcome: noticed, timeout or survived. by: the test that failed. tests: how many were to be run."""

    name: str
    key: str
    outcome: str
    by: str
    tests: int
    seconds: float


class Trial:
    """Tries mutations in a copy. A test that fails and that no map tells of is run without them too."""

    def __init__(self, copy: Copy, recorded: Sequence[Recorded]) -> None:
        self._copy, self._recorded = copy, recorded
        self._files = {of_file.file for of_file in recorded}
        self._anyhow: dict[str, bool] = {}  # of tests: whether they fail without any mutation

    def attempt(self, mutation: Mutation) -> Result:
        """Puts the mutation in, runs its tests, and takes it out again."""
        text = (ROOT / mutation.path).read_text(encoding="utf-8")
        tests, expected = chosen_tests(mutation, text, self._recorded)
        unknown = [file for file in tests_without_map(mutation) if file not in self._files]
        limit = LIMIT_SECONDS + LIMIT * expected + (WITHOUT_MAP_SECONDS if unknown else 0.0)
        began = time.perf_counter()
        self._copy.write(mutation.path, mutation.apply(text))
        try:
            outcome, by = self._outcome(mutation, text, [*tests, *unknown], limit)
        finally:
            self._copy.write(mutation.path, text)
        seconds = round(time.perf_counter() - began, 1)
        return Result(mutation.name, mutation.key(text), outcome, by, len(tests) + len(unknown), seconds)

    def _outcome(self, mutation: Mutation, text: str, tests: Sequence[str], limit: float) -> tuple[str, str]:
        while tests:
            broken = [f"--deselect={test}" for test, fails in self._anyhow.items() if fails]
            code, said = self._copy.test([*broken, *tests], limit)
            if code is None:
                return "timeout", ""
            gone = re.findall(r"^ERROR: (?:file or directory )?not found: (.+)$", said, re.MULTILINE)
            if (there := _without(tests, gone)) != list(tests):
                tests = there
                continue
            if code in (0, 5):  # 5: no test is left
                break
            found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
            by = found[1] if found else ""
            if not by and code > 0:  # a crash says nothing either, but counts
                raise RuntimeError(f"{mutation.name}: pytest itself failed ({code}):\n{said[-2000:]}")
            if by.partition("::")[0] in self._files or not self._fails_anyhow(by, mutation, text):
                return "noticed", by
        return "survived", ""

    def _fails_anyhow(self, test: str, mutation: Mutation, text: str) -> bool:
        if not test:
            return False
        if test not in self._anyhow:
            self._copy.write(mutation.path, text)
            code, _ = self._copy.test([test], WITHOUT_MAP_SECONDS)
            self._anyhow[test] = code != 0
            self._copy.write(mutation.path, mutation.apply(text))
        return self._anyhow[test]


def _without(tests: Sequence[str], gone: Sequence[str]) -> list[str]:
    """The tests but for those that pytest does not find: all of a function's where one case has another name
    by now, or one that no command can say; none where there is no such function."""
    kept: dict[str, None] = {}
    for test in tests:
        function = test.partition("[")[0]
        is_gone = any(name.endswith(function) for name in gone)
        if not is_gone or function != test:
            kept[function if is_gone else test] = None
    return list(kept)


def results() -> dict[str, Result]:
    """The newest of each mutation."""
    path = DATA / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {row["name"]: Result(**row) for row in rows}


def run(names: Sequence[str], workers: int, again: str) -> int:
    """Tries mutations; those of `again` ("survived", "all") although they have a result."""
    mutations = [m for m in load() if not names or {m.name, m.room} & {*names}]
    if said := wrong(mutations):
        print("\n".join(said), file=sys.stderr)
        return 1
    known = results()
    todo: queue.SimpleQueue[Mutation] = queue.SimpleQueue()
    for mutation in mutations:
        before = known.get(mutation.name)
        fresh = before is not None and before.key == mutation.key((ROOT / mutation.path).read_text())
        if not fresh or again == "all" or (before is not None and before.outcome == again):
            todo.put(mutation)
    recorded = read_map()
    lock = threading.Lock()

    def work(folder: Path) -> None:
        trial = Trial(Copy(folder), recorded)
        with contextlib.suppress(queue.Empty):
            while True:
                result = trial.attempt(todo.get_nowait())
                with lock, (DATA / "results.jsonl").open("a") as file:
                    file.write(json.dumps(result.__dict__) + "\n")
                    print(
                        f"{result.outcome:9} {result.seconds:6.1f} s  {result.name}  {result.by}", flush=True
                    )

    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        threads = [threading.Thread(target=work, args=(Path(place) / str(i),)) for i in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0


def make_map(files: Sequence[str]) -> int:
    """Records test files; those without a record where none is named."""
    folder = KEPT / "map"
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for file in files or test_files():
        out = folder / (file.removesuffix(".py").replace("/", "__") + ".json")
        if files or not out.is_file():
            failed += not record(file, out)
    return int(failed > 0)


# --- the table ---------------------------------------------------------------------------------------------


def table(mutations: Sequence[Mutation], found: dict[str, Result]) -> str:
    """As it stands in the page: rooms, then each survivor and why."""
    rows = [
        "| room | lines | mutations | noticed | of these by a time limit | survived | not tried |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    totals = [0] * 6
    by_room: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations:
        by_room[mutation.room].append(mutation)
    for room, members in by_room.items():
        outcomes = [found[m.name].outcome if m.name in found else "" for m in members]
        timeouts, survived = outcomes.count("timeout"), outcomes.count("survived")
        noticed = outcomes.count("noticed") + timeouts
        row = [_num_lines(room), len(members), noticed, timeouts, survived, outcomes.count("")]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        rows.append(f"| {room} | " + " | ".join(f"{value:,}" for value in row) + " |")
    rows.append("| all | " + " | ".join(f"{value:,}" for value in totals) + " |")
    survivors = [m for m in mutations if m.name in found and found[m.name].outcome == "survived"]
    if survivors:
        rows += ["", "Not noticed:", ""]
        rows += [f"- `{m.name}` ({m.harm}): {m.accepted or 'a test is missing.'}" for m in survivors]
    return "\n".join(rows)


def _num_lines(room: str) -> int:
    folder = ROOT / "colossus"
    files: Iterator[Path] = folder.glob("*.py") if room == "root" else (folder / room).rglob("*.py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def write_table() -> int:
    """Into the page, between its two marks; and of the results keeps the newest of each mutation."""
    mutations = load()
    known = results()
    found = {mutation.name: known[mutation.name] for mutation in mutations if mutation.name in known}
    lines = [json.dumps(result.__dict__) + "\n" for _, result in sorted(found.items())]
    (DATA / "results.jsonl").write_text("".join(lines))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(mutations, found)}\n\n{END}{after}", encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check")
    verbs.add_parser("map").add_argument("files", nargs="*")
    running = verbs.add_parser("run")
    running.add_argument("names", nargs="*", metavar="ID or ROOM")
    running.add_argument("-j", "--workers", type=int, default=1)
    running.add_argument("--again", choices=("survived", "timeout", "noticed", "all"), default="")
    verbs.add_parser("table")
    asked = parser.parse_args(arguments)
    if asked.verb == "map":
        return make_map(asked.files)
    if asked.verb == "run":
        return run(asked.names, asked.workers, asked.again)
    if asked.verb == "table":
        return write_table()
    mutations = load()
    said = wrong(mutations)
    print("\n".join(said) if said else f"{len(mutations)} mutations apply")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
