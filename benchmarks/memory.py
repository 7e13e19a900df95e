"""Peak memory of the default job, and of the loss at a vocabulary of 128k beside one that holds all logits.

Memory is private: anonymous pages of a process and all that it started, sampled from outside every few
milliseconds, above what the same imports alone take. Everything measured runs in its own process. The peer
of the loss is `F.cross_entropy` of x W^T, forward and backward, in the same type; both end with the gradients
of x and W.

    python -m benchmarks.memory [--quick] [--out FILE] [--minutes M]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

GIB = 2**30
SAMPLE_SECONDS = 0.005
VOCABULARY, WIDTH, TOKENS = 131_072, 256, 2048  # one micro batch of 4 x 512
LOSS_IMPORTS = "import torch, torch.nn.functional as F; from colossus.models.loss import cross_entropy"
LOSS = """
x = torch.randn({tokens}, {width}).requires_grad_()
weight = (0.02 * torch.randn({vocabulary}, {width})).requires_grad_()
targets = torch.randint({vocabulary}, ({tokens},))
loss = {loss}
loss.backward()
print(float(loss.detach()) / {tokens})
"""
OURS = "cross_entropy(x, weight, targets)[0]"
PEER = "F.cross_entropy(x @ weight.t(), targets, reduction='sum')"
TRAIN_IMPORTS = "import colossus.cli, colossus.api, colossus.trainer.loop, torch"
WAIT = "import sys; sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()"


def private_bytes(root: int) -> int:
    """Anonymous memory of a process and its descendants, now."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
    tree, found = [root], {root}
    for pid in tree:
        children = {child for child, parent in parents.items() if parent == pid} - found
        tree += children
        found |= children
    return sum(_anonymous(pid) for pid in found)


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def peak(command: list[str]) -> int:
    """The largest `private_bytes` of a command until it ends.

    Raises:
        CalledProcessError: it failed.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, private_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most


def after_imports(imports: str) -> int:
    """What a process holds once it has imported, and done nothing."""
    command = [sys.executable, "-c", f"{imports}\n{WAIT}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        held = private_bytes(process.pid)
        process.stdin.close()
    return held


def loss_bytes(loss: str) -> int:
    """Of one loss and its gradients, with x, W and theirs."""
    program = LOSS.format(tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY, loss=loss)
    return peak([sys.executable, "-c", f"{LOSS_IMPORTS}\n{program}"]) - after_imports(LOSS_IMPORTS)


def job_bytes(minutes: float) -> int:
    """Of `colossus train` without other arguments than its length."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        command = [sys.executable, "-m", "colossus", "train"]
        command += [f"run.minutes={minutes}", f"run.folder={folder}/run"]
        return peak(command) - after_imports(TRAIN_IMPORTS)


def measure(minutes: float) -> list[Figure]:
    ours, peer = loss_bytes(OURS), loss_bytes(PEER)
    return [
        Figure(
            f"loss of {TOKENS:,} tokens, vocabulary {VOCABULARY:,}", ours, "bytes", None, peer, ours / peer
        ),
        Figure("less than with all logits", (peer - ours) / GIB, "GiB", ">= 1"),
        Figure(f"default job of {minutes:g} minutes", job_bytes(minutes) / GIB, "GiB", "< 3"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a job of half a minute")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--minutes", type=float, default=None, help="of the job; default: 5")
    arguments = parser.parse_args()
    found = measure(arguments.minutes or (0.5 if arguments.quick else 5.0))
    print_figures(found)
    write_receipt("memory", found, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
