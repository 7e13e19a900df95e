"""Three tasks of the harness on data that lies here: a choice, a text to write, a text to predict."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ["local_choice", "local_writing", "local_rolling"]
ROWS = [
    {
        "question": f"def add_{n}(a, b): return a +",
        "choices": ["b", f"b * {n}", "a and then more"],
        "answer": n % 3,
        "written": "b",
        "text": f"def add_{n}(a, b):\n    return a + b * {n}\n" * (n + 1),
    }
    for n in range(6)
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: written
generation_kwargs: {until: [":"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
"""


def write_tasks(folder: Path) -> Path:
    """Writes the tasks and their data into `folder`, for `include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {folder / "cache"}
test_split: test
num_fewshot: 0
"""
    for name, body in zip(NAMES, (CHOICE, WRITING, ROLLING), strict=True):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{body}")
    return folder
