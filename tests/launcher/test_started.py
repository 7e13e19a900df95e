"""How a process was started, and what the first of several prepares for all, over restarts too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from colossus.errors import MachineError, UserError
from colossus.launcher import started
from colossus.launcher.started import Attempts
from colossus.layout import Layout
from colossus.parallel import meeting
from colossus.parallel.world import World
from tests.parallel.real_ranks import in_ranks

STARTERS = ("SLURM_", "OMPI_", "PMI_", "MV2_", "FLUX_")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# Of a script that `sbatch -n 2` runs: once, as the first of the job's tasks, and in no step of srun.
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_TASKS_PER_NODE": "2",
         "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *(name for name in os.environ if name.startswith(STARTERS))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False), ("10", False)])
def test_the_first_rank_is_the_one_that_speaks(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, first: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert started.is_first_rank() is first


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4"},  # a terminal of salloc
        BATCH,
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 in it
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # the terminal of salloc, where it runs as a step of its own
        {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "4294967290",
            "SLURM_STEP_NUM_TASKS": "1",
        },
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        # what srun started is torchrun, which started this
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | dict.fromkeys(NAMES, "1"),
    ],
)
def test_one_process_may_be_started_by_anything(
    alone: None, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started.check_started()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            r"PROCID=0: Slurm \(srun\) started 2 .*torchrun",
        ),
        ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "1", "SLURM_PROCID": "2"}, "PROCID=2: .* 3 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI .* started 2 .*torchrun"),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, r"PMI_RANK=0: MPI \(mpirun\) started 8"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "MVAPICH .* started 2"),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, "Flux .* started 2"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT: not set, while WORLD_SIZE is"),
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set, while RANK is"),
    ],
)  # fmt: skip
def test_several_that_do_not_know_of_each_other_are_refused(
    alone: None, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    """Each would make a run of its own."""
    from colossus import api

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        api.train(api.load_job(None, ["run.steps=1"]))


def test_a_process_alone_prepares_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def prepare(attempts: Attempts) -> tuple[object, ...]:
        return attempts.folder, attempts.name(tmp_path), attempts.folder

    with started.first_rank_prepares(prepare) as prepared:
        assert prepared == (None, tmp_path, None)
    with pytest.raises(UserError, match="a reason"), started.first_rank_prepares(lambda _: _refuse()):
        pass


def _refuse() -> None:
    raise UserError("a reason")


def _full_disk() -> None:
    raise MachineError("the disk")


def prepared(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What one rank gets, and whether the ranks can meet then; twice, as a script may train two runs."""

    def prepare(attempts: Attempts) -> dict[str, Any]:
        made = len(list(folder.iterdir()))
        (folder / f"{made}-by-{os.environ['RANK']}").touch()
        time.sleep(0.2)  # the other rank waits
        {"user error": _refuse, "machine error": _full_disk, "bug": lambda: 1 / 0}.get(kind, lambda: None)()
        return {"tokens": made, "by": os.environ["RANK"]}

    answers: list[dict[str, Any]] = []
    for _ in range(2):
        try:
            with (
                started.first_rank_prepares(prepare) as value,
                World.join(Layout(dp_replicate=1, dp_shard=2), "cpu") as world,
            ):
                answers.append({"value": value, "sum": world.sum([1.0 + world.rank])})
        except (UserError, MachineError) as error:
            return [{"error": f"{type(error).__name__}: {error}", "told": error.told}]
        except ZeroDivisionError:
            return [{"error": "a bug"}]
    return answers


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("user error", {"error": "UserError: a reason", "told": False}, None),
        ("machine error", {"error": "MachineError: the disk", "told": False}, None),
        ("bug", {"error": "a bug"}, "MachineError: rank 0 has failed before it was ready"),
    ],
)
def test_what_the_first_rank_raises_ends_all_and_is_told_once(
    tmp_path: Path, kind: str, first: dict[str, Any], second: str | None
) -> None:
    others = {"error": second or first["error"], "told": True}
    assert in_ranks(2, prepared, tmp_path, kind) == [[first], [others]]
    assert [path.name for path in tmp_path.iterdir()] == ["0-by-0"]


def test_one_rank_prepares_and_all_have_what_it_made(tmp_path: Path) -> None:
    expected = [{"value": {"tokens": n, "by": "0"}, "sum": [3.0]} for n in (0, 1)]
    assert in_ranks(2, prepared, tmp_path, "value") == [expected, expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-by-0", "1-by-0"]


@pytest.fixture
def store() -> Iterator[TCPStore]:
    """Of torchrun's own process, which keeps it over restarts."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def attempt(port: int, run: str, counts: tuple[int, int], late: int = -1) -> list[Any]:
    """What a rank hears in an attempt of two runs. counts: of restarts, as each of the two nodes says."""
    meeting.SAY_SECONDS = 0.3  # of this process
    rank = int(os.environ["RANK"])
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_RESTART_COUNT": str(counts[rank])}
    if rank == late:
        time.sleep(1.0)

    def prepare(attempts: Attempts) -> tuple[str | None, int]:
        known = attempts.folder
        if known is None:
            attempts.name(Path(f"{run}-by-{os.getpid()}"))
        return known.name if known else None, os.getpid()

    heard: list[Any] = []
    for _ in range(2):
        with (
            started.first_rank_prepares(prepare) as (known, process),
            World.join(Layout(dp_replicate=1, dp_shard=2), "cpu") as world,
        ):
            heard.append((known, process, world.sum([1.0])))
    return heard


def test_a_restart_goes_on_with_the_folder_that_the_first_attempt_named(store: TCPStore) -> None:
    """Each attempt hears its own first rank, whatever lies in the store; the second node is not counted, as
    torchrun restarts nodes whose ranks were well."""
    first, other = in_ranks(2, attempt, store.port, "none", (0, 0))
    assert first == other and [known for known, *_ in first] == [None, None]
    named = [f"none-by-{first[0][1]}"] * 2
    for late in (0, 1):
        again, other = in_ranks(2, attempt, store.port, "none", (1 + late, 0), late)
        assert again == other and [known for known, *_ in again] == named
        assert again[0][1] not in {process for _, process, _ in first}
    elsewhere, _ = in_ranks(2, attempt, store.port, "another", (0, 0))
    assert [known for known, *_ in elsewhere] == [None, None]


def test_an_attempt_that_never_met_is_no_meeting(store: TCPStore) -> None:
    """The first rank had come, the other died before: it must not complete that meeting in its next life."""
    for key in ("open", "here-0"):
        store.set(f"colossus/none/preparing/1/{key}", "")
    store.add("colossus/none/preparing/rounds", 1)
    store.add("colossus/none/preparing/1/arrived", 1)
    first, other = in_ranks(2, attempt, store.port, "none", (1, 1), 0)
    assert first == other and first[0][2] == [2.0]
