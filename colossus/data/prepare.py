"""From the corpora that a job names to token shards, built once and kept."""

from __future__ import annotations

from pathlib import Path

from colossus.data.build import Progress, Request, build, check_buildable, corpus_folder, is_built
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.open import is_listed_here, open_corpus
from colossus.data.order import BatchSchedule
from colossus.data.shards import read_manifest
from colossus.data.sources import TrainingData
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.hardware.machine import available_cores, cache_folder
from colossus.job import Job

MAX_TRAINED_VOCABULARY = 2**15  # of a tokenizer that is trained for a model whose vocabulary is a preset's


def prepare_data(job: Job, progress: Progress = lambda done, total: None) -> Job:
    """Builds the shards of a resolved job where they are not there yet; returns the job with `data.folder`.

    progress: called with (bytes done, bytes in all).

    Raises:
        UserError: a corpus or tokenizer is missing, empty or unreadable, or does not fit the model.
        MachineError: no space, no permission, or a process of the build was killed.
    """
    request = _request(job)
    folder = _folder(job, request)
    check_vocabulary(job, _tokens(request))
    build(request, folder, progress)
    check_vocabulary(job, _built_tokens(folder))
    return job.derive(**{"data.folder": str(folder)})


def check_data(job: Job) -> None:
    """Raises what `prepare_data` would before it reads the texts. Nothing is built, and neither a hub nor the
    user's own code is asked."""
    request = _request(job) if all(map(is_listed_here, job.data.corpus)) else None
    check_vocabulary(job, _tokens(request))
    folder = _folder(job, request)
    check_buildable(request, folder)
    if request is not None and is_built(request, folder):
        check_vocabulary(job, _built_tokens(folder))
        TrainingData.open(job.derive(**{"data.folder": str(folder)}), BatchSchedule(job.run.batch_schedule))


def _request(job: Job) -> Request:
    return Request(
        tuple(open_corpus(name, job.data.text_field) for name in job.data.corpus),
        tuple(job.data.weights),
        job.data.tokenizer,
        vocabulary_to_train(job),
        job.data.validation_fraction,
        available_cores(),
    )


def _tokens(request: Request | None) -> int | None:
    """Of the tokenizer that is named, where the request has opened it."""
    return request.given.vocab_size if request is not None and request.given is not None else None


def _built_tokens(folder: Path) -> int:
    tokens: int = read_manifest(corpus_folder(folder, 0))["tokenizer"]["vocab_size"]
    return tokens


def _folder(job: Job, request: Request | None) -> Path:
    """Where the shards lie: by their request, where the user names no folder; a new one if that is None."""
    name = request.key if request is not None else "unknown"
    return Path(job.data.folder or cache_folder() / "data" / name)


def vocabulary_to_train(job: Job) -> int:
    """Tokens of a byte-level BPE that is trained for the job.

    A preset's vocabulary was made for another corpus by far: one of 128k tokens would meet most of them
    too rarely to learn. A vocabulary that the user asked for is taken as it is.
    """
    size = job.model.vocab_size
    if job.origins.get("model.vocab_size") == "preset":
        return min(size, MAX_TRAINED_VOCABULARY)
    return size


def check_vocabulary(job: Job, tokens: int | None = None) -> None:
    """Raises `UserError` where the tokenizer has more tokens than the model has embeddings.

    tokens: that it has; None: as many as it has at least, as far as that is known before it is made.
    """
    name, least = job.data.tokenizer, ""
    if tokens is None:  # a bpe is trained to the model's vocabulary, and begins with bytes
        made = name in ("bpe", "bytes")
        tokens = BytesTokenizer.vocab_size if made else load_tokenizer(name).vocab_size
        least = "at least " * (name == "bpe")
    if tokens > job.model.vocab_size:
        raise UserError(
            f"model.vocab_size={job.model.vocab_size}: the tokenizer {name} has {least}{tokens} tokens; at "
            f"least {tokens}, or another data.tokenizer"
        )


def is_prepared(job: Job) -> bool:
    """Whether the shards that a job names are there, whatever became of the corpora since."""
    if job.data.folder is None:
        return False
    corpora = range(len(job.data.corpus))
    return all((corpus_folder(Path(job.data.folder), i) / "manifest.json").is_file() for i in corpora)
