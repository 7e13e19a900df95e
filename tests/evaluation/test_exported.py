"""One export, one figure: by the harness's own model of it, with no setting, and by `colossus eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra: pip install 'colossus-train[eval]'")
pytest.importorskip("accelerate", reason="the harness's own model of transformers needs it")

from colossus import api
from colossus.checkpoints.save import Saver
from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.models import build
from tests.data.kinds import saved
from tests.data.kinds import texts as texts_of_all_sorts
from tests.evaluation.local_tasks import CHOICE, ROLLING
from tests.models.reference import architecture

WORDS = texts_of_all_sorts(60, seed=3)[6:]
BODIES = {
    "choice": CHOICE,
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: written
generation_kwargs: {until: ["zzz"], max_gen_toks: 2, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "rolling": ROLLING,
}


def write_tasks(folder: Path, answers: dict[str, str]) -> list[str]:
    """Five tasks of each kind, on five parts of the words. answers: what is written behind a question, of
    which every second one is right."""
    names = []
    folder.mkdir()
    for part in range(5):
        words = WORDS[part::5]
        rows = [
            {
                "question": words[at] + (" " if at % 3 == 0 else ""),
                "choices": [" the cat", " and", words[at + 1]],
                "answer": at % 3,
                "written": answers.get(words[at], "?"),
                "text": f"{words[at]} {words[at + 1]}",
            }
            for at in range(len(words) - 1)
        ]
        data = folder / f"rows-{part}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for kind, body in BODIES.items():
            names.append(f"{kind}_{part}")
            files = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}"
            head = f"task: {names[-1]}\ndataset_path: json\n{files}\ntest_split: test\nnum_fewshot: 0\n"
            (folder / f"{names[-1]}.yaml").write_text(head + body)
    return names


def run(folder: Path, tokenizer: JsonTokenizer | BytesTokenizer) -> Path:
    """As training leaves it, with random weights."""
    arch = architecture(vocab_size=tokenizer.vocab_size, max_seq_len=256, initializer_range=0.5)
    model = build(arch, seed=0)
    tensors = {(name, "weight"): p.detach() for name, p in model.named_parameters()}
    with Saver(folder) as saver:
        saver.save(1, tensors, {"step": 1, "architecture": arch.model_dump()}, asynchronous=False)
    tokenizer.save(folder / "tokenizer")
    (folder / "job.toml").touch()
    return folder


@pytest.mark.parametrize("kind", ["bytes", "bpe", "byte_level", "prepend", "imported"])
def test_the_harness_finds_what_we_find(kind: str, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer: JsonTokenizer | BytesTokenizer
    if kind == "bytes":
        tokenizer = BytesTokenizer()
    elif kind == "bpe":
        tokenizer = train_bpe(WORDS, 300)
    else:
        found = load_tokenizer(saved("byte_level" if kind == "imported" else kind, tmp_path / "published"))
        assert isinstance(found, JsonTokenizer)
        tokenizer = found if kind == "imported" else found.taught(True, None)
    folder = run(tmp_path / "run", tokenizer)
    if kind == "imported":  # nothing was taught: nothing is put in front
        (folder / "job.toml").unlink()
    api.export_model(folder, tmp_path / "out", say=lambda line: None)
    model, ours = api.load_model(folder)
    assert ours is not None and bool(ours.begins) is (kind != "imported")
    questions = [word for word in WORDS if len(word) % 2]
    answers = zip(questions, api.generate(model, ours, questions, max_tokens=2), strict=True)
    names = write_tasks(tmp_path / "tasks", dict(answers))
    torch.set_num_threads(1)
    lm = HFLM(pretrained=str(tmp_path / "out"), batch_size=8, device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs: dict[str, Any] = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)[
        "results"
    ]
    for result in api.evaluate_tasks(model, ours, names, include_path=tmp_path / "tasks"):
        assert result.metrics and result.num_examples
        for metric, value in result.metrics.items():
            assert value == pytest.approx(theirs[result.task][f"{metric},none"], rel=1e-5), (
                result.task,
                metric,
            )
    written = [theirs[name]["exact_match,none"] for name in names if name.startswith("writing")]
    assert any(written), "no text was written as we wrote it: this shows little"
