"""Our models in lm-eval's harness, held against sums by hand and against its own model of transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra: pip install 'colossus-train[eval]'")

from colossus import api
from colossus.cli import main
from colossus.data.bpe import train_bpe
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.errors import UserError
from colossus.evaluation.harness import HarnessModel, sampling_of
from colossus.evaluation.tasks import load_tasks
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
    with torch.no_grad():
        then = int(model(torch.tensor([[*context, best]]))[0, -1].argmax())
    requests = [(("", ""), context, [best, then]), (("", ""), context, [best, then - 1])]
    assert [greedy for _, greedy in asked._loglikelihood_tokens(requests)] == [
        True,
        False,
    ]
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
    lm = HFLM(twin, tokenizer=theirs, max_length=WINDOW, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = simple_evaluate(lm, tasks=NAMES, task_manager=manager, bootstrap_iters=10)["results"]

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
        tokens = [tokenizer.bos_id, tokenizer.bos_id, *tokenizer.encode(text)]  # prefix, and what begins it
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


def test_all_that_a_task_says_of_the_choice_of_tokens() -> None:
    """As in `transformers`: top_k 0 is none, top_p 0 the likeliest; of greedy texts only a penalty."""
    every = {"top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
    drawn = sampling_of(every | {"do_sample": True, "temperature": 0.7, "until": ["a", ""]})
    assert drawn == every | {"max_tokens": 256, "stop": ["a"], "temperature": 0.7}
    assert sampling_of(every) == sampling_of({"repetition_penalty": 1.3})
    none = sampling_of({"do_sample": True, "top_k": 0, "top_p": None, "min_p": 0.0})
    assert none == {"max_tokens": 256, "stop": [], "temperature": 1.0, "min_p": 0.0}
    assert sampling_of({"do_sample": True, "top_p": 0.0})["top_k"] == 1
    assert sampling_of({"num_beams": 1, "typical_p": 1.0, "length_penalty": None}) == sampling_of({})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"num_beams": 4},
            r"generation_kwargs=num_beams: 4 is asked for, which is not supported; until, max_",
        ),
        ({"top_pp": 0.5}, r"generation_kwargs=top_pp: 0\.5 is .*; did you mean 'top_p'\?"),
        ({"bad_words_ids": [[1]]}, r"generation_kwargs=bad_words_ids: \[\[1\]\] is asked for"),
        ({"max_length": 12}, r"generation_kwargs=max_length: 12 is asked for"),
    ],
)
def test_what_a_task_may_not_ask(
    model: Decoder, tokenizer: JsonTokenizer, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    """Said of the task, before anything is computed."""
    with pytest.raises(UserError, match="^" + said):
        sampling_of({"until": ["a"]} | asked)
    folder = write_tasks(tmp_path / "own")
    task = folder / "local_writing.yaml"
    task.write_text(task.read_text().replace("do_sample: false", f"{json.dumps(asked)[1:-1]}"))
    with pytest.raises(UserError, match="^tasks=local_writing: " + said):
        api.evaluate_tasks(model, tokenizer, NAMES, include_path=folder)


def test_texts_with_a_penalty_are_those_of_transformers(model: Decoder, tokenizer: JsonTokenizer) -> None:
    twin = transformers_twin(model).eval()
    padding = [*range(tokenizer.vocab_size, model.arch.vocab_size)]
    texts = {}
    for penalty in (1.0, 1.4, 3.0):
        kwargs = {"until": ["zz"], "max_gen_toks": 9, "do_sample": False, "repetition_penalty": penalty}
        prompts = ["def add_1(a", "return", "a + b"]
        asked = HarnessModel(model, tokenizer, generate)
        texts[penalty] = asked.generate_until([ask(prompt, kwargs) for prompt in prompts])
        for prompt, text in zip(prompts, texts[penalty], strict=True):
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
            whole = twin.generate(
                torch.tensor([ids]),
                max_new_tokens=9,
                do_sample=False,
                repetition_penalty=penalty,
                suppress_tokens=padding,
                eos_token_id=tokenizer.eos_id,
            )
            assert text == tokenizer.decode(whole[0, len(ids) :].tolist())
    assert texts[1.0] != texts[3.0]


@pytest.mark.parametrize("context", ["def add", ""])
def test_a_continuation_without_tokens_is_none(
    model: Decoder, tokenizer: JsonTokenizer, context: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the likeliest of all."""
    asked = HarnessModel(model, tokenizer, generate)
    found = asked.loglikelihood([ask(context, "b"), ask(context, ""), ask(context, "c")])
    assert found[1] == (-math.inf, False)
    assert found[::2] == asked.loglikelihood([ask(context, "b"), ask(context, "c")])
    assert f"1 of 3 continuations make no token (the first behind {context!r})" in caplog.text


@pytest.mark.parametrize("context", [" ", "\n", "\n\n "])
def test_a_context_of_blanks_alone_is_as_an_empty_one(
    model: Decoder, tokenizer: JsonTokenizer, context: str
) -> None:
    """Also where nothing is put in front of texts: then the continuation follows the token that ends one."""
    state = json.loads(tokenizer.files()["tokenizer.json"]) | {"post_processor": None}
    plain = JsonTokenizer(json.dumps(state), None, tokenizer.eos_id)
    assert not plain.begins
    for asked in (HarnessModel(model, plain, generate), HarnessModel(model, tokenizer, generate)):
        first, second = asked.loglikelihood([ask(context, "ab"), ask("", f"{context}ab")])
        assert first == pytest.approx(second, rel=1e-12) and first[0] < 0


def test_a_continuation_that_is_one_token_with_its_context(model: Decoder, tokenizer: JsonTokenizer) -> None:
    """Then each is encoded by itself: else it would have no token, and the best score there is."""
    whole = next(
        text
        for text in (tokenizer.decode([token]) for token in range(258, tokenizer.vocab_size))
        if text.isalpha() and len(text) > 1 and len(tokenizer.encode(text)) == 1
    )
    context, continuation = whole[:-1], whole[-1:]
    assert len(tokenizer.encode(context)) == 1
    ((score, _),) = HarnessModel(model, tokenizer, generate).loglikelihood([ask(context, continuation)])
    tokens = [tokenizer.bos_id, *tokenizer.encode(context), *tokenizer.encode(continuation)]
    assert score == pytest.approx(by_hand(model, tokens, 1)[0], rel=1e-12)
    assert score < 0


def test_examples_that_precede_a_question_are_as_many_as_asked_for(folder: Path, tmp_path: Path) -> None:
    """Where the task leaves it open; one that says 0 itself gets none, as in the harness."""
    for name, keeps in (("open", False), ("own", True)):
        shutil.copytree(folder, tmp_path / name)
        for path in () if keeps else (tmp_path / name).glob("*.yaml"):
            path.write_text(path.read_text().replace("num_fewshot: 0\n", ""))
        for shots in (None, 2):
            loaded = load_tasks(["local_choice"], include_path=tmp_path / name, shots=shots).loaded
            expected = 0 if keeps else shots or 0
            assert loaded["tasks"]["local_choice"].get_config("num_fewshot") == expected


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
