"""A run on chats learns what the assistant says, and nothing else: against a loop written here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from colossus import api
from colossus.architecture import IGNORED
from colossus.data.loader import Batches
from colossus.data.order import BatchSchedule
from colossus.data.prepare import prepare_data
from colossus.data.shards import ShardedTokens
from colossus.data.sources import TrainingData
from colossus.job import Job
from colossus.monitor.summary import summary
from colossus.trainer.run import Run
from tests.trainer.test_step import exact_state, step

Make = Callable[..., Job]
BEGIN, END = 256, 257  # of the tokenizer of bytes


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Of two turns and of one, with questions longer than answers."""
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for i in range(60):
            messages = [
                {"role": "user", "content": f"What is {i} times {i}, please?"},
                {"role": "assistant", "content": f"It is {i * i}."},
                {"role": "user", "content": "And ü?"},
                {"role": "assistant", "content": f"ü{i}"},
            ]
            file.write(json.dumps({"messages": messages[: 2 + 2 * (i % 2)]}) + "\n")
    return path


def by_hand(messages: list[dict[str, str]]) -> list[tuple[int, bool]]:
    """Tokens, each with whether it is learned: the header of a message is not, the end of an answer is."""
    tokens: list[tuple[int, bool]] = []
    for message in messages:
        answers = message["role"] == "assistant"
        tokens += [(token, False) for token in (BEGIN, *f"{message['role']}\n".encode())]
        tokens += [(token, answers) for token in (*message["content"].encode(), END)]
    return tokens


def documents_of(source: ShardedTokens) -> list[tuple[int, ...]]:
    starts = [*source.document_starts(0, source.num_tokens).tolist(), source.num_tokens]
    return [tuple(source.tokens(a, b).tolist()) for a, b in itertools.pairwise(starts)]


def ready(small_job: Make, chats: Path, *overrides: str) -> tuple[Job, TrainingData, BatchSchedule]:
    folder = chats.parent / "shards"
    job = small_job("run", f"data.corpus={chats}", f"data.folder={folder}", *overrides)
    job = prepare_data(job)
    schedule = BatchSchedule(job.run.batch_schedule)
    return job, TrainingData.open(job, schedule), schedule


def expected_rows(chats: Path, data: TrainingData, samples: range, seq_len: int) -> list[Any]:
    """(tokens_T, {position: its learned next token}, where chats begin) of samples of the training chats."""
    records = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    held_out = set(documents_of(data.validation[0]))
    encoded = [by_hand(messages) for messages in records]
    training = [document for document in encoded if tuple(t for t, _ in document) not in held_out]
    assert 0 < len(held_out) == len(encoded) - len(training)
    stream = [pair for document in training for pair in document]
    starts = {0, *itertools.accumulate(map(len, training))}
    rows = []
    for sample in samples:
        begin = data.order.locate(sample)[2] * seq_len
        window = stream[begin : begin + seq_len + 1]
        targets = {i: token for i, (token, learned) in enumerate(window[1:]) if learned}
        begins = [i for i in range(seq_len) if begin + i in starts]
        rows.append((torch.tensor([token for token, _ in window[:-1]]), targets, begins))
    return rows


def test_what_is_masked_gives_no_loss_and_no_gradient(small_job: Make, chats: Path) -> None:
    job, data, schedule = ready(small_job, chats)
    with Batches(data.train, data.order, schedule, micro_batch=job.layout.micro_batch) as batches:
        batch = batches.next(0)
    rows = expected_rows(chats, data, range(4), job.data.seq_len)
    model = exact_state(job).model
    losses, count = [], 0
    for row, (tokens_T, targets, _) in enumerate(rows):
        assert torch.equal(batch.tokens_BT[row], tokens_T)
        logits_TV = model(tokens_T[None])[0]
        losses += [-F.log_softmax(logits_TV[i], 0)[token] for i, token in targets.items()]
        count += len(targets)
        others = [i for i in range(job.data.seq_len) if i not in targets]
        assert others and (batch.targets_BT[row, others] == IGNORED).all()
    loss = torch.stack(losses).sum() / count
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    state = exact_state(job)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in state.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: found.__setitem__(name, p.grad.clone())
        )
    result = step(state, batch, job)
    assert (result.num_targets, batch.num_targets) == (count, count)
    assert math.isclose(result.loss, float(loss.detach()), rel_tol=1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        reference = expected[name]
        assert reference is not None
        assert (gradient - reference).norm() <= 1e-9 * reference.norm() + 1e-14, name
    norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert math.isclose(result.grad_norm, norm, rel_tol=1e-9)


def test_a_run_on_chats(small_job: Make, chats: Path) -> None:
    """The first loss is the loop's; what is validated are the answers, per byte of them."""
    job, data, _ = ready(small_job, chats, "run.steps=6", "data.mask_documents=true", "run.validate_every=0")
    run = api.train(job)
    rows = expected_rows(chats, data, range(4), job.data.seq_len)
    model = exact_state(job).model
    losses = []
    with torch.no_grad():
        for tokens_T, targets, begins in rows:
            for begin, end in itertools.pairwise(sorted({0, *begins, len(tokens_T)})):
                logits_TV = model(tokens_T[None, begin:end])[0]
                losses += [
                    -F.log_softmax(logits_TV[i - begin], 0)[token]
                    for i, token in targets.items()
                    if begin <= i < end
                ]
    assert run.loss[0] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    held_out = documents_of(data.validation[0])
    records = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    records = [m for m in records if tuple(token for token, _ in by_hand(m)) in held_out]
    answers = [m["content"] for messages in records for m in messages if m["role"] == "assistant"]
    num_bytes = len("".join(answers).encode())
    (validation,) = run.events("validation")
    assert (validation["num_documents"], validation["num_bytes"]) == (len(held_out), num_bytes)
    assert validation["num_tokens"] == num_bytes + len(answers)  # and the end of each
    bits = validation["loss"] * validation["num_tokens"] / math.log(2) / num_bytes
    assert validation["bits_per_byte"] == pytest.approx(bits, rel=1e-9)
    kept = Path(job.run.folder) / "tokenizer" / "chat_template.jinja"
    assert kept.is_file()  # a model must be asked as it was taught


def test_the_sample_answers_a_held_out_question(small_job: Make, chats: Path) -> None:
    """In the template, up to where the answer begins; a prompt that is asked for is continued as it is."""
    job, data, _ = ready(small_job, chats, "run.steps=2")
    api.train(job)
    (sample,) = Run(Path(job.run.folder)).events("sample")
    records = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    held_out = set(documents_of(data.validation[0]))
    questions = []
    for messages in records:
        tokens = by_hand(messages)
        if tuple(token for token, _ in tokens) in held_out:
            first = next(i for i, (_, learned) in enumerate(tokens) if learned)
            questions.append(bytes(token for token, _ in tokens[:first] if token < 256).decode())
    assert sample["prompt"] in questions and sample["prompt"].endswith("assistant\n")
    assert f"colossus generate {job.run.folder} --chat" in summary(job.run.folder)
    asked = job.put({"run.prompt": "Once", "run.folder": job.run.folder + "-2"}, "argument")
    api.train(asked)
    assert Run(Path(asked.run.folder)).events("sample")[0]["prompt"] == "Once"
    assert f"colossus generate {asked.run.folder} Once" in summary(asked.run.folder)
