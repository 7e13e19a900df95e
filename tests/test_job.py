"""The job tree: grammar, precedence, errors, and the file that keeps it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import UserError
from colossus.job import fields, load_job, save_job


def test_nothing_given_leaves_all_to_be_derived() -> None:
    job = load_job()
    assert job.run.minutes is None and "model.hidden_size" in job.missing()
    assert "run.minutes" not in job.missing()


def test_precedence_argument_over_file_over_preset(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[model]\npreset = "llama3.2-1b"\nnum_layers = 3\nnum_heads = 16\n[run]\nsteps = 7\n')
    job = load_job(path, ["model.num_layers=2"])
    assert job.model.num_layers == 2 and job.origins["model.num_layers"] == "argument"
    assert job.model.num_heads == 16 and job.origins["model.num_heads"] == "file"
    assert job.model.hidden_size == 2048 and job.origins["model.hidden_size"] == "preset"
    assert job.derive(**{"run.steps": 9, "run.seed": 3}).run.steps == 7
    assert job.derive(**{"run.seed": 3}).origins["run.seed"] == "derived"


def test_preset_by_argument_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('model = "llama3.1-8b"\n')
    job = load_job(path, ["model=llama3.2-1b"])
    assert job.model.preset == "llama3.2-1b" and job.model.hidden_size == 2048


def test_the_stronger_length_wins_and_two_equals_contradict(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[run]\nminutes = 5\n")
    job = load_job(path, ["run.steps=10"])
    assert job.run.steps == 10 and job.run.minutes is None
    with pytest.raises(UserError, match=r"run\.minutes and run\.tokens"):
        load_job(None, ["run.minutes=5", "run.tokens=1e6"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.minuts=5", "did you mean 'run.minutes'"),
        ("rnu.minutes=5", "did you mean 'run'"),
        ("data.hidden_size=5", "did you mean 'model.hidden_size'"),
        ("run.steps=-3", "run.steps=-3: must be greater than or equal to 1"),
        ("run.steps=many", "run.steps=many: must be a whole number"),
        ("run.steps=2.5", "run.steps=2.5"),
        ("optimizer.lr=nan", "finite"),
        ("optimizer.lr=1e9", "must be less than or equal to 10"),
        ("run.minutes=1e30", "run.minutes=1e+30"),
        ("precision.type=bf61", "did you mean 'bf16'"),
        ("model=lama3.2-1b", "did you mean 'llama3.2-1b'"),
        ("model.hidden_size", "section.field=value"),
        ("layout.tp=0", "layout.tp=0"),
    ],
)
def test_bad_input_is_one_clear_message(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_job(None, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_job(tmp_path / "jb.toml")
    broken = tmp_path / "job.toml"
    broken.write_text("[run\n")
    with pytest.raises(UserError, match="not TOML"):
        load_job(broken)
    broken.write_text("run = 3\n")
    with pytest.raises(UserError, match="a table of fields"):
        load_job(broken)


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert load_job(None, ["run.folder=123"]).run.folder == "123"
    assert load_job(None, ["data.corpus=true"]).data.corpus == ["true"]
    assert load_job(None, ["run.tokens=15e12"]).run.tokens == 15 * 10**12
    assert load_job(None, ["data.corpus=['a','b']"]).data.corpus == ["a", "b"]


@given(
    folder=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x7f"), min_size=1),
    lr=st.floats(min_value=1e-12, max_value=10, allow_nan=False),
    seed=st.integers(0, 2**62),
    schedule=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), min_size=1, max_size=3),
    masked=st.booleans(),
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, folder, lr, seed, schedule, masked) -> None:
    job = load_job().put(
        {"run.folder": folder, "optimizer.lr": lr, "run.batch_schedule": schedule}, "argument"
    )
    job = job.derive(**{"run.seed": seed, "data.mask_documents": masked})
    path = tmp_path_factory.mktemp("job") / "job.toml"
    save_job(job, path)
    again = load_job(path)
    assert not again.differing(job)
    assert again.origins["run.seed"] == "derived" and again.origins["run.folder"] == "file"
    assert again.asked().run.seed is None and again.asked().run.folder == folder
    assert math.isclose(again.optimizer.lr, lr, rel_tol=0)


def test_every_field_has_one_name() -> None:
    names = fields()
    assert len(names) == len(set(names)) and all(name.count(".") == 1 for name in names)
