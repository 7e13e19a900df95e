"""Our models in lm-eval's harness, held against sums by hand and against its own model of transformers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra: pip install 'colossus-train[eval]'")

from colossus import api
from colossus.cli import main
from colossus.data.tokenizer import JsonTokenizer, train_bpe
from colossus.errors import UserError
from colossus.evaluation.harness import HarnessModel, sampling_of
from colossus.generation import generate
from colossus.models import Decoder, build
from tests.evaluation.local_tasks import NAMES, ROWS, write_tasks
from tests.models.reference import architecture, transformers_twin

WINDOW = 24
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> JsonTokenizer:
    return train_bpe([str(text) for text in TEXTS], 290)


@pytest.fixture(scope="module")
def model(tokenizer: JsonTokenizer) -> Decoder:
    arch = architecture(vocab_size=tokenizer.vocab_size + 3, max_seq_len=WINDOW, initializer_range=0.5)
    model = build(arch, seed=0, dtype=torch.float64)
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def by_hand(model: Decoder, tokens: list[int], first: int) -> tuple[float, bool]:
    """Of tokens[first:], one forward pass a token, each from at most a window that ends with the text's last
    input."""
    tokens = tokens[-WINDOW - 1 :] if len(tokens) > WINDOW + 1 else tokens
    total, greedy = 0.0, True
    for position in range(len(tokens) - first, len(tokens)):
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens[:position]]))[0, -1]
        total += math.log(float(torch.softmax(logits_V, -1)[tokens[position]]))
        greedy = greedy and int(logits_V.argmax()) == tokens[position]
    return total, greedy


def test_continuations_are_what_sums_by_hand_give(model: Decoder, tokenizer: JsonTokenizer) -> None:
    asked = HarnessModel(model, tokenizer, generate)
    # short and longer than the window, blanks before and behind, no context, equal inputs, no continuation
    pairs = [
        ("def add", "_1(a, b)"),
        (str(TEXTS[5]), " return"),
        ("a ", "b"),
        ("a", " b"),
        ("", "def"),
        ("def add", "("),
        ("def add", ")"),
    ]
    found = asked.loglikelihood([ask(*pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        first = len(whole) - len(tokenizer.encode(context.rstrip()))
        expected, likeliest = by_hand(model, [tokenizer.bos_id, *whole], first)
        assert score == pytest.approx(expected, rel=1e-12) and greedy == likeliest


def test_the_likeliest_continuation_is_told(model: Decoder, tokenizer: JsonTokenizer) -> None:
    asked = HarnessModel(model, tokenizer, generate)
    context = tokenizer.encode("def add")
    with torch.no_grad():
        best = int(model(torch.tensor([context]))[0, -1].argmax())
    requests = [(("", ""), context, [best]), (("", ""), context, [best - 1]), (("", ""), context, [])]
    assert [greedy for _, greedy in asked._loglikelihood_tokens(requests)] == [True, False, True]
    with pytest.raises(UserError, match="a continuation of 25 tokens; the model's window holds 24"):
        asked._loglikelihood_tokens([(("", ""), context, [1] * 25)])


def test_batches_and_parts_change_nothing(model: Decoder, tokenizer: JsonTokenizer) -> None:
    requests = [ask(str(text)[:n], str(text)[n : n + 9]) for text in TEXTS for n in (3, 17, 40)]
    asked = HarnessModel(model, tokenizer, generate)
    expected = asked.loglikelihood(requests)
    asked._batch_tokens = 1
    for one, other in zip(expected, asked.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-12) and one[1] == other[1]


def test_it_equals_the_harness_on_transformers(
    model: Decoder, tokenizer: JsonTokenizer, folder: Path, tmp_path: Path
) -> None:
    """All three kinds of task, by the harness's own model of transformers with equal weights."""
    pytest.importorskip("accelerate", reason="the harness's own model of transformers needs it")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    twin = transformers_twin(model).eval()
    expected: dict[str, Any] = {}
    # Asked to put a token before every text, it puts two before a whole one, and scores the second.
    for names, begins in ((NAMES[:2], True), (NAMES[2:], False)):
        lm = HFLM(twin, tokenizer=theirs, add_bos_token=begins, max_length=WINDOW, batch_size=4, device="cpu")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        expected |= simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=10)["results"]

    found = api.evaluate_tasks(model, tokenizer, NAMES, include_path=folder)
    assert [result.task for result in found] == NAMES
    for result in found:
        figures = expected[result.task]
        assert result.metrics and result.num_examples == len(ROWS) and result.shots == 0
        for metric, value in result.metrics.items():
            assert value == pytest.approx(figures[f"{metric},none"], rel=1e-6), (result.task, metric)
    assert found[0].errors["acc"] == pytest.approx(expected[NAMES[0]]["acc_stderr,none"])

    for request in (ask(str(text)) for text in TEXTS):
        ours = HarnessModel(model, tokenizer, generate).loglikelihood_rolling([request])
        assert ours == pytest.approx(lm.loglikelihood_rolling([request], disable_tqdm=True), rel=1e-6)


def test_rolling_bits_per_byte_by_hand(model: Decoder, tokenizer: JsonTokenizer, folder: Path) -> None:
    """Windows side by side, each from its own first token on; the last is filled up to the left."""
    (found,) = api.evaluate_tasks(model, tokenizer, ["local_rolling"], include_path=folder)
    nats = num_bytes = 0.0
    for text in map(str, TEXTS):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
        done = 0  # predicted tokens
        while done < len(tokens) - 1:
            stop = min(len(tokens) - 1, done + WINDOW)
            begin = max(0, stop - WINDOW)
            nats -= by_hand(model, tokens[begin : stop + 1], stop - done)[0]
            done = stop
        num_bytes += len(text.encode())
    assert found.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-9)


def test_texts_are_those_of_generate(model: Decoder, tokenizer: JsonTokenizer) -> None:
    asked = HarnessModel(model, tokenizer, generate)
    prompts = ["def add_1(a, b):", "return", "def"]
    greedy = {"until": ["zz"], "max_gen_toks": 5, "temperature": 0.7}
    drawn = {"until": "a", "max_new_tokens": 7, "temperature": 0.7, "do_sample": True, "top_p": 0.9}
    requests = [ask(prompt, kwargs) for prompt in prompts for kwargs in (greedy, drawn)]
    found = asked.generate_until(requests)
    assert found[::2] == generate(model, tokenizer, prompts, max_tokens=5, stop=["zz"])
    assert found[1::2] == generate(
        model, tokenizer, prompts, max_tokens=7, stop=["a"], temperature=0.7, top_p=0.9
    )


def test_what_a_task_asks_of_a_text() -> None:
    assert sampling_of({}) == {"max_tokens": 256, "stop": [], "temperature": 0.0}
    assert sampling_of({"do_sample": True, "max_tokens": 3})["temperature"] == 1.0


def test_mistakes(model: Decoder, tokenizer: JsonTokenizer, folder: Path, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        (
            {"names": ["local_chioce"]},
            "tasks=local_chioce: no such task of the harness; did you mean 'local_choice'",
        ),
        ({"names": [NAMES[0]], "include_path": tmp_path / "none"}, "no such folder"),
        ({"names": [NAMES[0]], "shots": -1}, "shots=-1: must be 0 or more"),
        ({"names": []}, "none is named"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(UserError) as raised:
            api.load_tasks(**({"include_path": folder} | arguments))
        assert message in str(raised.value)
    with pytest.raises(UserError, match="limit=0: must be at least 1"):
        api.evaluate_tasks(model, tokenizer, [NAMES[0]], include_path=folder, limit=0)
    (folder / "rows.jsonl").rename(folder / "gone.jsonl")
    try:
        with pytest.raises(UserError, match="tasks=local_choice: cannot be loaded: FileNotFoundError"):
            api.load_tasks([NAMES[0]], include_path=folder)
    finally:
        (folder / "gone.jsonl").rename(folder / "rows.jsonl")


def test_on_the_command_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for n, text in enumerate(TEXTS):
        Path(f"texts/{n}.txt").write_text(str(text))
    settings = "data.corpus=texts data.tokenizer=bytes data.seq_len=64 model.hidden_size=32 run.steps=2"
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path / "cache"))
    api.train(api.load_job(None, [*settings.split(), "run.folder=run", "layout.compile=false"]))
    before = dict(os.environ)
    words = ["--tasks", ",".join(NAMES), "--include-path", str(folder), "--limit", "2", "--type", "fp32"]
    assert main(["eval", "run", *words, "--json", "out.json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Only the first 2 examples" in out and dict(os.environ) == before
    report = json.loads(Path("out.json").read_text())
    model, tokenizer = api.load_model("run")
    expected = api.evaluate_tasks(model, tokenizer, NAMES, include_path=folder, limit=2)
    assert [task["task"] for task in report["tasks"]] == NAMES and report["corpora"] == []
    for task, result in zip(report["tasks"], expected, strict=True):
        assert task["metrics"] == pytest.approx(result.metrics, rel=1e-4) and task["num_examples"] == 2
        assert f"{next(iter(task['metrics'].values())):.4f}" in out
