"""A stranger's folder: nothing elsewhere is read or waited for, no file takes more memory than its kind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.cli import main
from colossus.errors import MachineError, UserError
from colossus.events import read_events
from colossus.interchange.files import read_kept
from colossus.job import load_run_job
from colossus.models.hf.published import open_published
from colossus.untrusted import num_bytes, open_file, parse_json, read_file
from tests.models.hf.tiny import make as make_model
from tests.models.hf.tiny import save

SECRET = "the secret of somebody else"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("once") / "model")


@pytest.fixture
def published(once: Path, tmp_path: Path) -> Path:
    """A published model of a few thousand weights with a tokenizer."""
    shutil.copytree(once, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 0, "content": "<|eos|>"}], "model": {"vocab": {}}})
    )
    return tmp_path / "model"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text(SECRET)
    return tmp_path / "elsewhere" / "secret"


def fifo(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path, elsewhere: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def device(path: Path, elsewhere: Path) -> None:
    path.symlink_to("/dev/zero")


def absolute_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def relative_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(os.path.relpath(elsewhere, path.parent))


def link_by_a_folder(path: Path, elsewhere: Path) -> None:
    (path.parent / "inner").symlink_to(elsewhere.parent)
    path.symlink_to("inner/secret")


def loop(path: Path, elsewhere: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


KINDS = [fifo, bound_socket, device, absolute_link, relative_link, link_by_a_folder, loop, folder]
Make = Callable[[Path, Path], None]


@pytest.mark.parametrize("make", KINDS)
def test_what_is_no_file_of_the_folder(make: Make, tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "theirs" / "file"
    make(path, elsewhere)
    for read in (open_file, num_bytes, lambda path: read_file(path, 100)):
        with pytest.raises(OSError) as caught:
            read(path)
        assert caught.value.strerror


def test_links_within_a_folder_and_to_the_blobs_of_the_hub(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_file(tmp_path / "b", 3) == b"abc" and num_bytes(tmp_path / "b") == 3
    with pytest.raises(OSError, match="longer than 2 bytes"):
        read_file(tmp_path / "b", 2)
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1f").write_bytes(b"blob")
    inner = cache / "snapshots" / "main" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "top").symlink_to("../../blobs/1f")
    (inner / "deep").symlink_to("../../../blobs/1f")
    (inner / "out").symlink_to(elsewhere)
    assert read_file(inner.parent / "top", 9) == read_file(inner / "deep", 9) == b"blob"
    with pytest.raises(OSError, match="leads out of"):
        read_file(inner / "out", 99)


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(OSError, match="longer than"):
        read_file(tmp_path / "huge", 2**20)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, "1" * 5000, "{", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_json_that_cannot_be(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("make", [fifo, device, absolute_link])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_a_published_folder(name: str, make: Make, published: Path, elsewhere: Path) -> None:
    """An error in words, none of them of the other file; or it counts as missing."""
    path = published
    (path / name).unlink(missing_ok=True)
    make(path / name, elsewhere)
    for act in (lambda: open_published(path), lambda: api.load_model(path), lambda: read_kept(path)):
        try:
            found = act()
        except (UserError, MachineError) as error:
            assert SECRET not in str(error)
        else:
            assert SECRET not in str(found)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**5}, {"num_hidden_layers": 99_999, "vocab_size": 10**9}]
)
def test_a_config_of_more_layers_than_there_are_numbers(change: dict[str, Any], published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"too few for the \d+ layers"):
        open_published(published)


@pytest.mark.parametrize("make", KINDS)
def test_the_log_of_a_run(make: Make, tmp_path: Path, elsewhere: Path) -> None:
    elsewhere.write_text('{"attempt": 0, "run_seconds": 0, "kind": "step"}\n')
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "events.jsonl", elsewhere)
    assert read_events(tmp_path / "run") == []


def test_lines_that_are_no_events(tmp_path: Path) -> None:
    good = '{"attempt": 0, "run_seconds": 0, "kind": "step"}\n'
    (tmp_path / "events.jsonl").write_text(
        "[" * 100_000 + "\n" + good + '{"attempt":' * 100_000 + "\n" + good
    )
    assert len(read_events(tmp_path)) == 2


@pytest.mark.parametrize("make", KINDS)
def test_the_job_of_a_run(make: Make, tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "job.toml", elsewhere)
    with pytest.raises(UserError, match=r"job\.toml"):
        load_run_job(tmp_path / "run")


def test_a_job_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("x = " + "[" * 100_000)
    with pytest.raises(UserError, match="not TOML"):
        load_run_job(tmp_path)


CODE = """
from pathlib import Path
Path({told!r}).touch()
from colossus.trainer.hooks import Hook

class Watch(Hook):
    pass

def documents():
    yield "some words " * 50
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves a file where it is imported."""
    told = tmp_path / "imported"
    (tmp_path / "strange_code.py").write_text(CODE.format(told=str(told)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "strange_code", raising=False)
    return told


NAMES = ["run.hooks=strange_code:Watch", "data.corpus=strange_code:documents"]


@pytest.mark.parametrize("word", NAMES)
def test_dry_imports_nothing(word: str, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry", word, "run.steps=1"]) == 0
    assert word.split("=")[1] in capsys.readouterr().out
    assert not code.exists() and "strange_code" not in sys.modules


@pytest.mark.parametrize("word", NAMES)
def test_code_that_a_folder_names(word: str, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused without a look at it; the user's own words, a job file or --trust-code let it be imported."""
    assert main(["train", "--dry", word, "run.steps=1"]) == 0
    run = Path("theirs")
    run.mkdir()
    (run / "job.toml").write_text(capsys.readouterr().out)
    for words in (["theirs"], ["theirs/job.toml"], ["run.folder=theirs"], ["--exact", "theirs/job.toml"]):
        assert main(["train", *words]) == 2, words
        said = capsys.readouterr().err
        assert f"its job would run code, {word}" in said and "--trust-code" in said
    assert not code.exists()
    assert main(["train", "--dry", "theirs"]) == 0 and not code.exists()
    with pytest.raises(UserError, match="--trust-code"):
        api.load_job("theirs")
    with pytest.raises(UserError, match="--trust-code"):
        api.train(api.job_module.load_job(None, ["run.folder=theirs"]))
    assert not code.exists()
    assert api.resolve(api.load_job("theirs", trust_code=True)).run.folder == "theirs"
    assert api.resolve(api.load_job("theirs", [word])).run.folder == "theirs"
    (run / "job.toml").unlink()
    section, field = word.split("=")[0].split(".")
    tables: dict[str, dict[str, str]] = {"run": {"steps": "1"}, "data": {}}
    tables[section][field] = f'["{word.split("=")[1]}"]'
    text = "".join(
        f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in t.items()) for name, t in tables.items()
    )
    Path("mine.toml").write_text(text)
    code.unlink(missing_ok=True)
    sys.modules.pop("strange_code", None)
    api.resolve(api.load_job("mine.toml"))
    assert code.exists()


def test_weights_of_a_size_that_this_machine_has_not(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colossus.generation.load.memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"its weights take .*; this machine has 1 kB"):
        api.load_model(published)
