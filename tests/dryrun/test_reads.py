"""What a start is said to read is what real ranks read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints.format import DamagedCheckpoint
from colossus.checkpoints.load import latest
from colossus.cli import main
from colossus.dryrun.held import Held, held
from colossus.dryrun.reads import planned
from colossus.dryrun.source import Source
from colossus.dryrun.worker import answers
from colossus.errors import UserError
from colossus.job import load_job, to_toml
from tests.dryrun.loading import watched
from tests.ranks.cases import Case
from tests.ranks.pool import Pool as Ranks
from tests.trainer.resharding import go_on

WIDE = {
    "num_layers": 2,
    "intermediate_size": 16_396,
}  # matrices of many chunks, which no count of ranks cuts between two
UNEQUAL = [{"replicas": 1, "share": 2}, {"replicas": 1, "share": 6, "micro_batch": 3, "recompute": "full"}]
PAIRS = {
    "more shards": (Case.of(WIDE, dp_shard=2), {"dp_shard": 3}),
    "other tp and pp": (Case.of(WIDE, tp=2), {"pp": 2, "dp_replicate": 2}),
    "unequal pools": (Case.of(WIDE, dp_shard=2), {"dp_replicate": 2, "dp_shard": 2, "pools": UNEQUAL}),
    "experts": (
        Case.of({}, preset="deepseek-v3", optimizer="muon", dp_shard=2, ep=2),
        {"pp": 2, "tp": 2, "ep": 2},
    ),
}


def other(name: str) -> Case:
    return dataclasses.replace(PAIRS[name][0], layout=tuple(PAIRS[name][1].items()))


@pytest.fixture(scope="module")
def stages() -> dict[tuple[str, int], list[Held]]:
    """Of each pair, of the world that saves and of the one that loads: a rank of each stage."""
    asked, found = [], dict[tuple[str, int], list[Held]]()
    for name, (case, _) in PAIRS.items():
        for which, job in enumerate((case.job(), other(name).job())):
            each = job.layout.num_ranks // job.layout.dp_replicate // job.layout.pp
            asked += [((name, which), (job, stage * each)) for stage in range(job.layout.pp)]
    for (key, _), answer in zip(asked, answers(held, [arguments for _, arguments in asked]), strict=True):
        found.setdefault(key, []).append(answer)
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_what_real_ranks_read(
    name: str, stages: dict[tuple[str, int], list[Held]], pool: Ranks, tmp_path: Path
) -> None:
    """To the byte and the file, of a checkpoint that is there and of one that nobody has written."""
    case, layout = PAIRS[name][0], other(name).job().layout
    pool.run(case.job().layout.num_ranks, go_on, case, None, tmp_path, 1)
    really: list[dict[str, Any]] = pool.run(layout.num_ranks, watched, other(name), tmp_path)
    assert not any(each.pop("twice") for each in really)
    path = latest(tmp_path)
    assert path is not None
    for source in (Source.of(Path("job.toml"), case.job(), stages[name, 0]), Source.at(path)):
        reads = planned(source, stages[name, 1], layout)
        for rank, each in enumerate(really):
            said = reads.of_rank(rank)
            assert {figure: said[figure] for figure in each} == each, (rank, source.is_there)
        assert reads.to_dict()["storage_bytes"] == sum(each["storage_bytes"] for each in really)
    assert reads.state <= reads.data.sum() < 1.3 * reads.state


def test_what_another_optimizer_kept_is_refused(stages: dict[tuple[str, int], list[Held]]) -> None:
    """As loading refuses it, by the tensor."""
    source = Source.of(Path("job.toml"), PAIRS["experts"][0].job(), stages["experts", 0])
    kept = [dataclasses.replace(s, key=(s.key[0], "exp_avg")) for s in stages["experts", 0][0].loaded]
    other_kind = dataclasses.replace(stages["experts", 0][0], loaded=tuple(kept))
    with pytest.raises(UserError, match=r"job.toml holds no .* \(exp_avg\)"):
        planned(source, [other_kind], PAIRS["experts"][0].job().layout)


SMALL = ["model.hidden_size=64", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"]
SMALL += ["model.head_dim=32", "model.intermediate_size=96", "model.vocab_size=256", "data.seq_len=64"]
FLEET = ["fleet=dgx-h100-1", "run.global_batch=8", "layout.pp=1", "layout.tp=1"]


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "before.toml"
    job = load_job(None, [*SMALL, *FLEET, "layout.dp_shard=2", "layout.dp_replicate=1"])
    path.write_text(to_toml(job))
    return path


def test_the_verb(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kind of rank, and of the whole world, beside what else a dry run says."""
    pools = "layout.pools=[{replicas=1,share=2},{replicas=1,share=6}]"
    words = [*SMALL, *FLEET, "layout.dp_shard=2", "layout.dp_replicate=2", "layout.micro_batch=1", pools]
    assert main(["dryrun", *words, "--from", str(job_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    whole, ranks = found["reads"], found["ranks"]
    assert whole["from_is_there"] is False and whole["writers"] == 2
    assert whole["data_bytes"] == whole["state_bytes"]  # each byte by one of those that hold it
    assert whole["received_bytes"] == whole["state_bytes"]  # and passed on to the other
    assert sum(r["alike"] * r["reads"]["mean_storage_bytes"] for r in ranks) == whole["storage_bytes"]
    assert max(r["reads"]["most"]["storage_bytes"] for r in ranks) == whole["most"]["storage_bytes"]


@pytest.mark.parametrize(
    ("words", "source", "said"),
    [
        ([], "nowhere", "--from nowhere: no job file, no run's folder and no checkpoint"),
        ([], "{folder}", "--from {folder}: no job file, no run's folder and no checkpoint"),
        (
            ["model.num_layers=3"],
            "{file}",
            "{file}: of another model; differing in model (there, here): num_",
        ),
        (["--rank", "2"], "{file}", "--rank 2: the layout has 2 ranks; 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    words: list[str], source: str, said: str, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"file": job_file, "folder": job_file.parent}
    layout = ["layout.dp_shard=2", "layout.dp_replicate=1"]
    asked = ["dryrun", *SMALL, *FLEET, *layout, *words, "--from", source.format(**places)]
    assert main(asked) == 2
    assert f"error: {said.format(**places)}" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(pool: Ranks, tmp_path: Path) -> None:
    """With the file, as far as anything but its data tells."""
    case = PAIRS["more shards"][0]
    pool.run(case.job().layout.num_ranks, go_on, case, None, tmp_path, 1)
    path = latest(tmp_path)
    assert path is not None
    for name, length in (("pieces-00001.safetensors", 100), ("pieces-00000.index", 0)):
        whole = (path / name).read_bytes()
        for left in (whole[:length], None):
            (path / name).unlink()
            if left is not None:
                (path / name).write_bytes(left)
            with pytest.raises(DamagedCheckpoint, match=name):
                Source.at(path)
        (path / name).write_bytes(whole)
    assert Source.at(path).is_there


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("")
    job = load_job(None, [*SMALL, *FLEET, "layout.dp_shard=2"])
    with pytest.raises(
        UserError, match=r"--from .*: this run has no checkpoint yet; of its job, .*job\.toml"
    ):
        api.dry_run(job, source=tmp_path)
