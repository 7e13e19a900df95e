#!/usr/bin/env bash
# PyTorch 2.13.0: every gloo process group has a thread of its own, which wakes a hundred times a second though
# nobody sends anything: its wait for messages has a time limit of ten milliseconds. A process with the groups
# of five axes and their pairs makes thousands of context switches a second while it does nothing; a machine on
# which many such processes wait (several ranks a machine, a pool of ranks in tests) gives a third of its time to
# them. Idle NCCL groups are not looked at here.
#
# Seen: with 1 group 1 thread and 96 switches a second, with 33 groups 33 threads and 3,222.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__


def of_gloo() -> list[Path]:
    return [t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text().startswith("gloo_tcp_loop")]


def switches() -> int:
    lines = [line for t in of_gloo() for line in (t / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
per_thread = []
for more in (0, 32):
    for _ in range(more):
        dist.new_group([0])
    time.sleep(0.5)
    before, began = switches(), time.perf_counter()
    time.sleep(4)
    rate = (switches() - before) / (time.perf_counter() - began)
    print(f"{1 + more} groups: {len(of_gloo())} threads of gloo, {rate:,.0f} context switches a second, idle")
    assert len(of_gloo()) == 1 + more
    per_thread.append(rate / (1 + more))
assert all(40 < rate < 150 for rate in per_thread), per_thread
PYTHON
"$folder/env/bin/python" "$folder/main.py" "$folder"
