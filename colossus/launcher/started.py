"""How this process was started: alone, or as one of several ranks, of which the first prepares for all."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from colossus.errors import MachineError, UserError

Prepared = TypeVar("Prepared")
PREPARING = timedelta(days=1)  # that building the data may take
TELLING = timedelta(seconds=10)  # that the others have to hear why there is none
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# (program, how many it started, which one this is). Of Slurm the number of a step, which srun starts: the
# script of a batch job (sbatch -n 2) runs once, as task 0 of SLURM_NTASKS, and a terminal of salloc as none.
OTHER_STARTERS = (
    ("Slurm (srun)", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("Open MPI (mpirun)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI (mpirun)", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH (mpirun)", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Flux (flux run)", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)


def is_rank() -> bool:
    """Whether a launcher started this process as one of the ranks of a job."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def check_started() -> None:
    """Raises `UserError` where this is one of several processes that do not know of each other: each would
    make a run of its own."""
    given = [name for name in RANK_VARIABLES if os.environ.get(name)]
    if os.environ.get("WORLD_SIZE") == "1":
        return
    if "RANK" in given or "WORLD_SIZE" in given:
        if lacking := [name for name in RANK_VARIABLES if name not in given]:
            raise UserError(
                f"{', '.join(lacking)}: not set, while {', '.join(given)} is; a rank needs all of "
                f"{', '.join(RANK_VARIABLES)}; start the ranks by torchrun, or unset them"
            )
        return
    for program, number, rank in OTHER_STARTERS:
        size = os.environ.get(number, "1")
        if os.environ.get(rank) and size.isdecimal() and int(size) > 1:
            raise UserError(
                f"{rank}={os.environ[rank]}: {program} started {size} processes, each of which would make a "
                "run of its own; let it start one process, or one torchrun on each node (torchrun --nnodes N "
                "--nproc-per-node RANKS --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m colossus train ...)"
            )


class Attempts:
    """What the attempts of one start of several ranks tell each other; a process alone has one attempt.

    It is in the store of torchrun's own process, and ends with it: a later start finds nothing of it.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store
        # A script may train several runs one after another: each attempt counts them alike.
        process = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{os.getpid()}"
        self._run = f"folder-{store.add(f'runs-of-{process}', 1)}" if store is not None else ""

    @property
    def folder(self) -> Path | None:
        """The folder of an unnamed run, where an earlier attempt has named it."""
        if self._store is None or not self._store.check([self._run]):
            return None
        return Path(self._store.get(self._run).decode())

    def name(self, folder: Path) -> Path:
        """Lets later attempts go on with the run in `folder`, which this one has named."""
        if self._store is not None:
            self._store.set(self._run, str(folder))
        return folder


@contextlib.contextmanager
def first_rank_prepares(prepare: Callable[[Attempts], Prepared]) -> Iterator[Prepared]:
    """What `prepare` returns; where torchrun started several processes, the first one alone calls it.

    The place where they meet for that stays open until this is left: a process group that is made within
    meets there too. What the first rank raises is raised on all, and told by the first.

    Raises:
        MachineError: not all came, or the first rank ended.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield prepare(Attempts())
        return
    from torch.distributed import DistError

    from colossus.parallel.meeting import connect, meet

    store, rank, size = meet("preparing")
    if rank == 0:
        yield _prepared_for_all(lambda: prepare(Attempts(connect())), store, size)
        return
    store.set_timeout(PREPARING)
    try:
        prepared = pickle.loads(store.get("prepared"))
        if store.add("told", 1) == size - 1:
            store.set("all told", "")
    except DistError:
        prepared = MachineError("rank 0 has ended before it was ready")
    if isinstance(prepared, (UserError, MachineError)):
        prepared.told = True
        raise prepared
    yield prepared


def _prepared_for_all(prepare: Callable[[], Prepared], store: Any, size: int) -> Prepared:
    """What `prepare` returns or raises, told to the others."""
    from torch.distributed import DistError

    try:
        prepared = prepare()
    except BaseException as error:
        known = isinstance(error, (UserError, MachineError))
        said = error if known else MachineError("rank 0 has failed before it was ready")
        with contextlib.suppress(DistError):  # the store may end with this process
            store.set("prepared", pickle.dumps(said))
            if isinstance(error, Exception):
                store.wait(["all told"], TELLING)
        raise
    store.set("prepared", pickle.dumps(prepared))
    return prepared
