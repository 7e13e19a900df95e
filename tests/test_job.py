"""The job tree: grammar, precedence, errors, and the file that keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import UserError
from colossus.job import SECTIONS, fields, load_job, preset_names, save_job


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


NOT_FINITE = ("nan", "inf", "-inf", "1e400", "-1e999")
ODD_KEYS = (
    "",
    ".",
    "..",
    "run.",
    ".run",
    ".run.steps",
    "run..steps",
    "run.steps.",
    " run.steps",
    "run .steps",
)


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
        (
            "run.batch_schedule=[[5,1]]",
            "run.batch_schedule=[[5, 1]]: must be pairs of (from step, sequences)",
        ),
        ("run.batch_schedule=[]", "the first from step 0"),
        ("run.batch_schedule=[[0,1],[3,2],[3,4]]", "each step once"),
        ("run.batch_schedule=[[0,0]]", "run.batch_schedule.0.1=0: must be greater than or equal to 1"),
        ("data.skip=[[5,2]]", "data.skip=[[5, 2]]: must be pairs of (first sample, the one after the last)"),
        ("data.weights=[1,-1]", "data.weights.1=-1: must be greater than or equal to 0"),
        ("data.corpus=['']", "data.corpus.0=: must not be empty"),
        ("data.phases=[{from_step=1,sequence_length=2}]", "data.phases.0.sequence_length: no such field"),
        ("data.phases=[{}]", "data.phases.0.from_step: must be given"),
        ("data.phases=[{from_step=3,seq_len=8},{from_step=3}]", "must be phases from different steps"),
        ("model.rope_scaling={factor=8}", "model.rope_scaling.original_max_seq_len: must be given"),
        ("data.weights=[0,0.0]", "data.weights=[0, 0.0]: must be numbers of at least 0, one above 0"),
        ("run.minutes=1e-300", "run.minutes=1e-300: must be greater than or equal to 0.0001"),
        *((f"run.minutes={n}", f"run.minutes={n}: must be a finite number") for n in NOT_FINITE),
        *((f"run.steps={n}", f"run.steps={n}: must be a finite number") for n in NOT_FINITE),
        *((f"layout.tp={n}", f"layout.tp={n}: must be a finite number") for n in NOT_FINITE),
        *((f"data.weights=[1,{n}]", f"data.weights.1={n}: must be a finite number") for n in NOT_FINITE),
        *((f"data.skip=[[0,{n}]]", f"data.skip.0.1={n}: must be a finite number") for n in NOT_FINITE),
        *((f"model.experts.scale={n}", f"model.experts.scale={n}: must be a fin") for n in NOT_FINITE),
        *((f"{key}=3", f"'{key}=3': expected section.field=value or section=PRESET") for key in ODD_KEYS),
        ("run.steps.x=3", "run.steps.x: no such field; run.steps has no fields"),
        (
            "model.experts.scale.x=3",
            "model.experts.scale.x: no such field; model.experts.scale has no fields",
        ),
        ("data.phases.0.seq_len=3", "data.phases is a list of tables; give all of it, as in data.phases=[{"),
        ("model.experts.per_tokn=2", "did you mean 'model.experts.per_token'?"),
        ("model.experts={num_experts=4,per_tokn=2}", "did you mean 'model.experts.per_token'?"),
        ("model.experts={num_expert=4}", "did you mean 'model.experts.num_experts'?"),
        ("layout.pools=[{replica=1}]", "layout.pools.0 has replicas, share, micro_batch, recompute; did you"),
        ("model.latent={x=1}", "model.latent.x: no such field; model.latent has q_rank, kv_rank, "),
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
    assert load_job(None, ["data.corpus=[a, b:C]"]).data.corpus == ["a", "b:C"]  # as the brief shows it


@given(
    folder=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x7f"), min_size=1),
    lr=st.floats(min_value=1e-12, max_value=10, allow_nan=False),
    seed=st.integers(0, 2**62),
    schedule=st.dictionaries(st.integers(1, 10**6), st.integers(1, 10**6), max_size=3),
    masked=st.booleans(),
)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, folder, lr, seed, schedule, masked) -> None:
    job = load_job().put(
        {"run.folder": folder, "optimizer.lr": lr, "run.batch_schedule": [(0, 1), *schedule.items()]},
        "argument",
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


NUMBERS = ["-1", "-0.5", "nan", "inf", "-inf", "1e400", "1e30", "9" * 30, "true", "abc", "''", "[true]"]


@pytest.mark.parametrize("name", [n for n in fields() if not n.endswith(".preset")])
def test_absurd_values_of_every_field_are_one_message(name: str) -> None:
    """What is refused is named in one line; what is taken is a text, a list or a flag."""
    taken = []
    for value in [*NUMBERS, "{a=1}", "[[1]]", "[]", "2020-01-01", "[1,2]"]:
        try:
            taken.append(load_job(None, [f"{name}={value}"]).get(name))
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(name), (value, error)
            assert not any(word in str(error) for word in ("Input", "instance of", "datetime", "tuple"))
    for value in taken:
        assert isinstance(value, str | bool | list), name


@given(
    tree=st.dictionaries(
        st.sampled_from([*SECTIONS, "made", "origins", "modle"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(
                    st.sampled_from(["preset", "derived", "steps", "lr", "skip", "hidden_size", "x.y"]), inner
                )
            ),
            max_leaves=5,
        ),
        max_size=3,
    )
)
def test_no_job_file_ends_in_a_traceback(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text("\n".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in tree.items()), encoding="utf-8")
    with contextlib.suppress(UserError):
        load_job(path)


def as_toml(value) -> str:
    if value is None:
        return "1979-05-27T07:32:00Z"  # TOML has no null; a date is what else it has
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


def test_one_message_for_a_field_and_one_line_for_each() -> None:
    with pytest.raises(UserError) as error:
        load_job(None, ["run.seed=-1", "run.threads=0", "data.skip=[1,2,3]"])
    assert len(str(error.value).splitlines()) <= 3
    with pytest.raises(UserError) as error:
        load_job(None, ["run.batch_schedule=[1,2,3]"])
    assert str(error.value) == "run.batch_schedule.0=1: must be a list"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run.batch_schedule=[[0,4],[3,5]", "']' is missing at the end"),
        ("data.skip=[[0,4", "']]' is missing at the end"),
        ("data.phases=[{from_step=2,weights=[1,2]", "'}]' is missing at the end"),
        ("layout.pools=[{replicas=1]", "']' at place 13, where '}' is expected"),
        ("fleet.pools={accelerator='h100-sxm'}]", "']' at place 25 closes nothing; one too many, or"),
        ("run.batch_schedule=[0,4],[3,5]]", "']' at place 12 closes nothing; one too many, or"),
        ("data.weights=[1,2", "']' is missing at the end"),
        ("data.corpus=[a,b", "']' is missing at the end"),
        ('run.hooks=["a:B]', '" is opened and never closed'),
        ("model.experts={num_experts=8", "'}' is missing at the end"),
        ('data.phases=[{"from_step":2}]', "not TOML (Expected '=' after a key in a key/value pair)"),
    ],
)
def test_of_a_list_or_table_that_is_none_the_bracket_at_fault_is_named(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_job(None, [words])
    assert str(error.value).startswith(f"{words}: {said}")


def test_a_job_file_that_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"job file {path}: cannot be read \(no regular file\)"):
            load_job(path)


def test_names_may_have_brackets() -> None:
    for name in ("[2024] texts", "a[1", "[it's]"):
        assert load_job(None, [f"data.corpus={name}"]).data.corpus in ([name], [name.strip("[]")])


@pytest.mark.parametrize("words", ["model=llama3.2-1b", "model.preset=llama3.2-1b"])
def test_a_preset_brings_its_values_however_it_is_named(words: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[model]\npreset = "llama3.1-8b"\n')
    job = load_job(path, [words])
    assert (job.model.preset, job.model.hidden_size) == ("llama3.2-1b", 2048)
    assert job.origins["model.preset"] == job.origins["model.hidden_size"] == "preset"


def test_a_kept_job_knows_what_came_from_a_preset(tmp_path: Path) -> None:
    job = load_job(None, ["model=llama3.1-8b", "model.num_layers=3"]).derive(**{"run.seed": 5})
    path = tmp_path / "job.toml"
    save_job(dataclasses.replace(job, made={"processor": "x"}), path)
    again = load_job(path)
    assert not again.differing(job)
    origins = {n: again.origins[n] for n in ("model.hidden_size", "model.num_layers", "run.seed")}
    assert list(origins.values()) == ["preset", "file", "derived"]
    other = load_job(path, ["model=llama3.2-1b"]).asked()
    assert (other.model.preset, other.model.hidden_size, other.model.num_layers) == ("llama3.2-1b", 2048, 3)
    assert other.run.seed is None


@given(
    given_by=st.dictionaries(
        st.sampled_from(["preset", "file", "argument", "derived"]), st.integers(1, 99), min_size=1
    )
)
def test_the_strongest_origin_wins_whatever_else_is_given(tmp_path_factory, given_by) -> None:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    lines = ['preset = "llama3.2-1b"'] if "preset" in given_by else []
    if "file" in given_by:
        lines.append(f"num_layers = {given_by['file']}")
    path.write_text("\n".join(["[model]", *lines]))
    job = load_job(path, [f"model.num_layers={given_by['argument']}"] if "argument" in given_by else [])
    if "derived" in given_by:
        job = job.derive(**{"model.num_layers": given_by["derived"]})
    strongest = next((o for o in ("argument", "file", "preset", "derived") if o in given_by), None)
    expected = 16 if strongest == "preset" else given_by[strongest]
    assert job.model.num_layers == expected and job.origins["model.num_layers"] == strongest


@pytest.mark.parametrize("name", preset_names("model"))
def test_every_preset_of_a_model_is_whole(name: str) -> None:
    job = load_job(None, [f"model={name}"])
    unused = ["model.rope_theta"] if job.model.position == "learned" else []
    missing = [n for n in job.missing() if n.startswith("model.")]
    assert missing == [*unused, "model.initializer_range"]


def test_every_preset_loads() -> None:
    for section in SECTIONS:
        for name in preset_names(section):
            load_job(None, [f"{section}={name}"])


def test_a_value_across_lines_stays_text() -> None:
    assert load_job(None, ["run.prompt='a'\nb = 3"]).run.prompt == "'a'\nb = 3"
    with pytest.raises(UserError, match=r"run\.steps"):
        load_job(None, ["run.steps=5\nx = 3"])


def test_what_was_planned_or_derived_was_not_asked_for() -> None:
    job = load_job(None, ["layout.tp=2"])
    job = job.put({"layout.pp": 4}, "planned").put({"layout.cp": 8}, "derived")
    assert [job.asked_for(f"layout.{axis}") for axis in ("tp", "pp", "cp", "ep")] == [
        True,
        False,
        False,
        False,
    ]
    asked = job.asked()
    assert (asked.layout.tp, asked.layout.pp, asked.layout.cp) == (2, None, None)


def test_a_planned_layout_is_told_apart_in_the_file(tmp_path: Path) -> None:
    job = load_job(None, ["run.steps=7"]).put({"layout.tp": 2}, "planned")
    path = tmp_path / "job.toml"
    save_job(dataclasses.replace(job, made={"processor": "x"}), path)
    assert "tp = 2  # planned" in path.read_text()
    again = load_job(path)
    assert again.origins["layout.tp"] == "planned" and again.asked().layout.tp is None
    assert again.asked().run.steps == 7


def test_one_value_of_a_table_leaves_the_others(tmp_path: Path) -> None:
    """Of a preset, of a file, and of words before."""
    before = load_job(None, ["model=deepseek-v3"]).model.experts
    job = load_job(None, ["model=deepseek-v3", "model.experts.per_token=4", "model.experts.scale=3"])
    assert before is not None and job.model.experts == before.model_copy(
        update={"per_token": 4, "scale": 3.0}
    )
    path = tmp_path / "job.toml"
    path.write_text('[model]\npreset = "deepseek-v3"\nexperts = { num_experts = 12, per_token = 3 }\n')
    experts = load_job(path, ["model.experts.scale=2"]).model.experts
    assert experts is not None
    assert (experts.num_experts, experts.per_token, experts.scale) == (12, 3, 2.0)


def test_a_field_without_its_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("steps = 3\n")
    for path, words in ((tmp_path / "job.toml", []), (None, ["steps=3"])):
        with pytest.raises(UserError, match=r"^steps: a field needs its section; .*'run\.steps'"):
            load_job(path, words)


@pytest.mark.parametrize(("reshard", "zero"), [("true", 3), ("false", 1)])
def test_a_run_of_before_zeros_levels_goes_on(reshard: str, zero: int, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'[layout]\nreshard = {reshard}\n\n[origins]\nderived = ["layout.reshard"]\n')
    job = load_job(path)
    assert job.layout.zero == zero and not job.asked_for("layout.zero")
    job = load_job(None, [f"layout.reshard={reshard}"])
    assert job.layout.zero == zero and job.asked_for("layout.zero")
    with pytest.raises(UserError, match=r"layout\.reshard: no such field"):
        load_job(None, ["layout.reshard=2"])
