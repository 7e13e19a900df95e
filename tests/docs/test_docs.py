"""What the documentation says is so: its examples run, its names exist, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import colossus
from colossus import api
from colossus.cli import app, main
from colossus.cli.words import split
from colossus.job import SECTIONS, fields, load_job
from colossus.trainer.run import Run
from tests.docs.pages import PAGES, ROOT, Block, blocks, code, name, prose

EXAMPLES = [page for page in PAGES if any(b.language in ("python", "console") for b in blocks(page))]
TINY = (
    "data.corpus=texts data.tokenizer=bytes data.seq_len=64 model.hidden_size=32 run.steps=10 "
    "run.folder=runs/first"
)
MAKES_FIRST_RUN = {"docs/train.md"}  # the other pages go on with that run
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FIELD = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_0-9]+)\b(?![./(])")
FILE_ENDINGS = {"md", "py", "toml", "json", "html", "jsonl", "safetensors"}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `texts/` and, in `runs/first`, a run on them; its caches lie beside it."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLOSSUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield _with_first_run(folder)


def _with_first_run(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for n in range(8):
        lines = [f"def add_{n}(a, b):\n    return a + b * {k * n}\n" for k in range(40)]
        (folder / "texts" / f"{n}.txt").write_text("\n".join(lines))
    with _in(folder):
        api.train(load_job(None, TINY.split()))
    return folder


class _in:
    """Work in a folder, and come back."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)


@pytest.fixture
def folder(first_run: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where the examples of a page run."""
    shutil.copytree(first_run / "texts", tmp_path / "texts")
    if name(request.param) not in MAKES_FIRST_RUN:
        shutil.copytree(first_run / "runs", tmp_path / "runs")
    return tmp_path


@pytest.mark.parametrize(("page", "folder"), [(p, p) for p in EXAMPLES], ids=name, indirect=["folder"])
def test_examples(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page in order, in one folder and one namespace."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    namespace: dict[str, object] = {"__name__": "example"}
    try:
        for block in blocks(page):
            if block.note == "file":
                Path(block.said).write_text(block.text)
            elif block.language == "python" and block.note != "not run":
                exec(compile("\n" * block.line + block.text, name(page), "exec"), namespace)
            elif block.language == "console":
                for command, shown in block.commands():
                    _check_command(block, command, shown, capsys)
    finally:
        torch.set_num_threads(threads)


def _check_command(block: Block, command: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # set for this command alone
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(w for w in words[1:] if "=" not in w) in targets, f"{block.where}: {command}"
    elif words[:2] == ["python", "-m"]:
        module = words[2].replace(".", "/")
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module).is_dir(), f"{block.where}: {command}"
    elif words[0] == "colossus" and block.note == "not run":
        assert block.said, f"{block.where}: say why it is not run"
        _check_words(block, words[1:])
    elif words[0] == "colossus":
        capsys.readouterr()
        exit_code = main(words[1:])
        out, err = capsys.readouterr()
        errors = [line for line in shown if line.startswith("error: ")]
        assert err.splitlines() == errors, f"{block.where}: {command}"
        assert exit_code == (2 if errors else 0), f"{block.where}: {command}: exit code {exit_code}"
        if block.note == "exact":
            assert out.strip().splitlines() == "\n".join(shown).strip().splitlines(), block.where
    else:
        assert words[0] in ("pip", "git", "cd", "sh"), f"{block.where}: what is {words[0]}?"


def _check_words(block: Block, words: list[str]) -> None:
    """That the verb and its options exist, and that the values are those of a job."""
    verb: click.Command = typer.main.get_command(app())
    while isinstance(verb, click.Group) or hasattr(verb, "commands"):
        assert words[0] in verb.commands, f"{block.where}: no verb {words[0]}"
        verb, words = verb.commands[words[0]], words[1:]
    known = {option for parameter in verb.params for option in parameter.opts}
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert set(flags) <= {*known, "--help"}, f"{block.where}: {words}"
    if any(parameter.name == "words" for parameter in verb.params):
        plain = [word for word in words if not word.startswith("--") and not word.isdigit()]
        path, overrides = split(plain)
        load_job(path if path is not None and path.is_file() else None, overrides)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{name(page)}: {link}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fields_exist(page: Path) -> None:
    known = {*fields(), *(f"run.{attribute}" for attribute in dir(Run))}
    found = {f"{s}.{leaf}" for text in code(page) for s, leaf in FIELD.findall(text)}
    text = page.read_text(encoding="utf-8")  # may show what a mistake is answered with
    wrong = {
        f for f in found - known if f.split(".")[1] not in FILE_ENDINGS and f"error: {f}: no such" not in text
    }
    assert not wrong, f"{name(page)}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_verbs_exist(page: Path) -> None:
    verbs = typer.main.get_command(app()).commands
    found = {verb for text in code(page) for verb in re.findall(r"(?<![\w./-])colossus ([a-z]+)\b", text)}
    assert found <= set(verbs), f"{name(page)}: {found - set(verbs)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_the_package_exist(page: Path) -> None:
    for text in code(page):
        for dotted in re.findall(r"(?<![\w./-])colossus\.([a-z_]+(?:\.\w+)*)", text):
            first = dotted.split(".")[0]
            if first not in colossus.__all__ and dotted not in FILE_ENDINGS:
                _assert_importable(f"colossus.{dotted}", page)


def _assert_importable(dotted: str, page: Path) -> None:
    module, _, attribute = dotted.rpartition(".")
    if importlib.util.find_spec(module) is not None and attribute[:1].isupper():
        assert hasattr(importlib.import_module(module), attribute), f"{name(page)}: {dotted}"
        return
    found = importlib.util.find_spec(dotted) is not None or hasattr(
        importlib.import_module(module), attribute
    )
    assert found, f"{name(page)}: {dotted}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {link.partition("#")[0] for link in LINK.findall(prose(index))}
    assert {page.name for page in PAGES if page.parent == index.parent} - {"index.md"} <= linked
