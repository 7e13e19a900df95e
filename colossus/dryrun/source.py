"""The checkpoint that a world goes on from: one that is there, or what another dry world would save."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colossus.checkpoints.foreseen import Foreseen
from colossus.checkpoints.format import COMMITTED, MANIFEST, Manifest, Writers, group_name, index_name
from colossus.checkpoints.index import DONE, encode_group, encode_index
from colossus.checkpoints.manifest import encode, read_claim
from colossus.checkpoints.pieces import pieces_of
from colossus.dryrun.held import Held
from colossus.errors import UserError
from colossus.job import Job
from colossus.trainer.state import meta_of

COMMITTED_BYTES = 131

Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """What is known of a checkpoint without its data.

    path: of one that is there; else of the job that the dry world follows. claim: bytes of COMMITTED and the
    manifest; headers, indexes: of each writer's file and index; groups: of each group's index.
    """

    path: Path
    is_there: bool
    manifest: Manifest
    writers: Writers
    claim: int
    headers: Sizes
    indexes: Sizes
    groups: Sizes

    @classmethod
    def at(cls, path: Path) -> Source:
        """Its data is not read. Raises UserError where it is of format 1, DamagedCheckpoint where it is none,
        or files of it are missing, of another length, or do not say what they said."""
        manifest = read_claim(path)
        writers = manifest.source
        if not isinstance(writers, Writers):
            raise UserError(f"--from {path}: of format 1, which has no rules to plan by; one of format 2")
        pieces = pieces_of(path, manifest)
        pieces.check_sizes()
        groups = [group_name(group) for group in range(len(writers.vouched))] if writers.group > 1 else []
        return cls(
            path,
            True,
            manifest,
            writers,
            sum(_sizes(path, (COMMITTED, MANIFEST))),
            np.array([header.size for header in pieces.headers()]),
            np.array(_sizes(path, map(index_name, range(writers.num)))),
            np.array(_sizes(path, groups), dtype=np.int64),
        )

    @classmethod
    def of(cls, path: Path, job: Job, stages: Iterable[Held]) -> Source:
        """Of what the ranks of a job's world would save. Of its `meta` the decisions are not known."""
        stages = list(stages)
        foreseen = Foreseen.of((s for stage in stages for s in stage.saved), stages[0].num_writers)
        indexes = [foreseen.index(writer) for writer in range(foreseen.num_writers)]
        manifest = foreseen.manifest(meta_of(job.model), indexes)
        assert isinstance(manifest.source, Writers)
        return cls(
            path,
            False,
            manifest,
            manifest.source,
            COMMITTED_BYTES + len(encode(manifest)),
            np.array([index.file.header_bytes for index in indexes]),
            np.array([len(encode_index(index) + DONE) for index in indexes]),
            np.array([len(encode_group(group) + DONE) for group in foreseen.groups(indexes)], dtype=np.int64),
        )


def _sizes(path: Path, names: Iterable[str]) -> list[int]:
    try:
        return [os.stat(path / name).st_size for name in names]  # noqa: PTH116
    except OSError as error:
        raise UserError(f"--from {error.filename}: {error.strerror}") from None
