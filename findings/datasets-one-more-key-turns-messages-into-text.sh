#!/usr/bin/env bash
# datasets 5.2.0: one record whose message has a key more than the others changes how *all* messages are stored.
# load_dataset("json") of chats whose messages have the same keys gives structs. Where a single message of the file
# has one key more (here `weight`, as trainers use it to leave an answer out), the feature becomes Json, and
# to_parquet writes each message of every record as a string of JSON, under the extension type arrow.json. Indexing
# the data set still shows dictionaries; who reads the Parquet file with pyarrow gets strings. The same records by
# Dataset.from_list are structs again, with a null for the key where it was not given.
#
# So a trainer that reads Parquet with pyarrow finds text where a list of objects is meant, by one record among all.
#
# Seen: list<struct<role, content>>, then list<extension<arrow.json>> with '{"role":"user","content":"a"}', and by
# from_list list<struct<role, content, weight>> with {'role': 'user', 'content': 'a', 'weight': None}.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 FOLDER="$folder" "$folder/env/bin/python" -W ignore - <<'PYTHON'
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

assert datasets.__version__ == "5.2.0", datasets.__version__
datasets.disable_progress_bars()
folder = os.environ["FOLDER"]


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def stored(name, rows, from_list=False):
    """The type of a message in the Parquet file, and the first one as pyarrow reads it."""
    if from_list:
        data = datasets.Dataset.from_list(rows)
    else:
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        data = datasets.load_dataset("json", data_files=f"{folder}/{name}.jsonl", split="train")
    assert data[0]["messages"][0]["role"] == "user"  # whatever it is stored as
    data.to_parquet(f"{folder}/{name}.parquet")
    table = pq.read_table(f"{folder}/{name}.parquet")
    kind = table.schema.field("messages").type.value_type
    message = table.to_pylist()[0]["messages"][0]
    print(f"{name}: {kind}, {message!r}")
    return kind, message


alike = [chat("a", "b"), chat("c", "d")]
one_more = [chat("a", "b"), chat("c", "d", weight=0)]
kind, message = stored("alike", alike)
assert pa.types.is_struct(kind) and message == {"role": "user", "content": "a"}
kind, message = stored("one_more", one_more)
assert not pa.types.is_struct(kind) and json.loads(message) == {"role": "user", "content": "a"}, "no longer as text"
kind, message = stored("one_more_from_list", one_more, from_list=True)
assert pa.types.is_struct(kind) and message == {"role": "user", "content": "a", "weight": None}
print("one key more in one message stores every message as text")
PYTHON
