"""What a run reads: the shards of its corpora, the order of its samples, the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.data.build import open_split
from colossus.data.order import BatchSchedule, Order, Phase
from colossus.data.shards import ShardedTokens
from colossus.data.tokenizer import Tokenizer, load_tokenizer
from colossus.errors import UserError
from colossus.job import Job

VERIFIED_BYTES = 2**31  # of shards that are read whole before a run begins: half a second


@dataclass(frozen=True)
class TrainingData:
    """Opened once a process; nothing of it is copied into memory.

    train, validation: a split of each corpus of the job, in the job's order.
    """

    train: list[ShardedTokens]
    validation: list[ShardedTokens]
    tokenizer: Tokenizer
    phases: list[Phase]
    order: Order

    @classmethod
    def open(
        cls, job: Job, schedule: BatchSchedule, running: Sequence[dict[str, Any]] | None = None
    ) -> TrainingData:
        """Opens what `prepare_data` built for a resolved job.

        running: the phases that a run began with; what they read must be what is there.

        Raises:
            UserError: shards are missing, damaged, or changed under the run.
        """
        folder = Path(job.data.folder)
        corpora = range(len(job.data.corpus))
        train = [open_split(folder, index, "train") for index in corpora]
        validation = [open_split(folder, index, "validation") for index in corpora]
        phases = phases_of(job, schedule, [source.fingerprint for source in train])
        if running is not None:
            _check_unchanged(job, [Phase.from_dict(phase) for phase in running], phases)
        sizes = [source.num_tokens for source in train]
        order = Order(job.run.seed, phases, sizes, job.data.skip)
        return cls(train, validation, load_tokenizer(folder / "tokenizer"), phases, order)

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Reads the shards whole, where that takes no time. Raises `UserError` for a byte that changed.

        Of `size` ranks, each reads its share of the files. `colossus data build --verify` reads shards of any
        size.
        """
        shards = [*self.train, *self.validation]
        if sum(source.num_file_bytes for source in shards) <= VERIFIED_BYTES:
            for source in shards:
                source.verify(rank=rank, size=size)

    def facts(self) -> list[dict[str, Any]]:
        """What each corpus holds, as plain data."""
        return [
            {
                "corpus": train.manifest["corpus"]["name"],
                "fingerprint": train.manifest["corpus"]["fingerprint"],
                "notes": train.manifest["corpus"].get("notes", []),
                "documents": train.num_documents,
                "tokens": train.num_tokens,
                "bytes": train.num_bytes,
                "held_out_documents": held_out.num_documents,
                "held_out_tokens": held_out.num_tokens,
                "held_out_bytes": held_out.num_bytes,
            }
            for train, held_out in zip(self.train, self.validation, strict=True)
        ]


def phases_of(job: Job, schedule: BatchSchedule, fingerprints: Sequence[str]) -> list[Phase]:
    """The phases of a job's data: the first from sample 0, then those that `data.phases` asks for."""
    seq_len, weights = job.data.seq_len, tuple(job.data.weights)
    phases = [Phase(0, seq_len, weights, tuple(fingerprints))]
    for change in sorted(job.data.phases, key=lambda change: change.from_step):
        seq_len = change.seq_len or seq_len
        weights = tuple(change.weights or weights)
        first_sample = schedule.first_sample(change.from_step)
        if first_sample == 0:
            phases.clear()
        phases.append(Phase(first_sample, seq_len, weights, tuple(fingerprints)))
    return phases


def _check_unchanged(job: Job, running: list[Phase], found: list[Phase]) -> None:
    for before, now in zip(running, found, strict=False):  # those to come may be others
        for name, old, new in zip(job.data.corpus, before.fingerprints, now.fingerprints, strict=True):
            if old != new:
                raise UserError(
                    f"data.folder={job.data.folder}: the shards of {name} changed since this run began "
                    f"(fingerprint {old} then, {new} now); bring them back, or start a new run"
                )
