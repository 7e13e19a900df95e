"""An event log as a run of five minutes leaves it, made by formula; `interrupted` adds a killed attempt."""

from __future__ import annotations

import json
import math
import random
import tomllib
from pathlib import Path

GZIP, BZ2, XZ = 1.602, 1.512, 1.508
START = 1_790_000_000.0


class Writer:
    """Appends events with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "events.jsonl").open("a", encoding="utf-8")
        self.attempt, self.run_seconds, self.downtime = 0, 0.0, 0.0

    def write(self, kind: str, step: int | None, **fields) -> None:
        event = {"schema": 1, "time": round(START + self.downtime + self.run_seconds, 3)}
        event |= {"run_seconds": round(self.run_seconds, 3), "attempt": self.attempt, "rank": None}
        self.file.write(json.dumps(event | {"step": step, "kind": kind} | fields) + "\n")
        self.file.flush()


def write_run(folder: Path, *, steps: int = 1800, interrupted: bool = False, finished: bool = True) -> Path:
    """Writes `events.jsonl` into `folder` and returns it."""
    log, noise = Writer(folder), random.Random(0)
    start_fields = {
        "num_ranks": 1,
        "processor": "AMD EPYC 9B14 96-Core Processor",
        "device": "cpu",
        "peak_flops_per_second": 180e9,
        "model_flops_per_token": 7.9e6,
        "torch": "2.13.0+cpu",
        "python": "3.11.7",
        "minutes": 5,
        "job": JOB,
        "origins": ORIGINS,
        "num_parameters": 1_312_896,
        "machine": {
            "processor": "AMD EPYC 9B14 96-Core Processor",
            "cores": 2,
            "memory_bytes": 25_769_803_776,
            "best_type": "fp32",
        },
    }
    log.write("decision", 0, name="compile", value=False, first_step=0)
    log.write("start", 0, **start_fields, total_steps=None)
    kill_at, back_to = (steps // 2 + 57, steps // 2) if interrupted else (None, None)
    step, decay_from, killed = 0, int(steps * 0.7), False
    while step < steps:
        if step == kill_at and not killed:
            killed, step = True, back_to
            log.attempt, log.downtime = 1, 420.0
            log.write("resume", step, **start_fields, total_steps=None)
        seconds = 0.149 * (1 + 0.06 * noise.random()) + (
            6.5 if step == 0 or (step == back_to and killed) else 0
        )
        wait = 0.0004 + (0.05 if noise.random() < 0.01 else 0)
        log.run_seconds += seconds + wait
        loss = 2.05 + 6.2 * math.exp(-step / 60) + 1.1 * math.exp(-step / 500) + noise.gauss(0, 0.06)
        decay = min(1.0, max(0.02, (steps - step) / (steps - decay_from)))
        loss -= 0.28 * (1 - decay)
        factor = min(1.0, (step + 1) / 90) * decay
        speed = 2048 / (seconds + wait)
        log.write(
            "step",
            step,
            loss=loss,
            grad_norm=0.4 + 3 * math.exp(-step / 40) + abs(noise.gauss(0, 0.08)),
            lr_factor=factor,
            lr=factor * 3e-3,
            tokens=2048,
            targets=2048,
            step_seconds=round(seconds, 6),
            data_wait_seconds=round(wait, 6),
            tokens_per_second=round(speed, 1),
            mfu=round(speed * 7.9e6 / 180e9, 5),
            total_steps=steps if step >= decay_from else None,
        )
        step += 1
        if step == decay_from:
            value = {"begin_step": decay_from, "end_step": steps, "begin_factor": 1.0, "end_factor": 0.02}
            log.write("decision", step, name="decay", value=value, first_step=step)
        if step % (steps // 8) == 0 and step < steps:
            if step == steps // 8:
                log.write("decision", step, name="validation_documents", value=14, first_step=step)
            log.run_seconds += 1.4
            log.write("validation", step, whole=False, **_validation(loss, 14, 1.4))
        if step % (steps // 4) == 0:
            log.run_seconds += 0.004
            _checkpoint(log, step)
    log.run_seconds += 9.0
    log.write("validation", steps, whole=True, **_validation(1.73, 33, 9.0))
    log.write("sample", steps, prompt="def ", text=SAMPLE)
    if finished:
        log.write("end", steps, reason="finished")
    return folder


def _checkpoint(log: Writer, step: int) -> None:
    path = f"checkpoints/step-{step:08}"
    log.write(
        "checkpoint", step, path=path, saved_step=step, bytes=15_754_752, blocked_seconds=0.004, seconds=0.06
    )


def _validation(loss: float, documents: int, seconds: float) -> dict:
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / 1.72,
        "gzip_bits_per_byte": GZIP,
        "bz2_bits_per_byte": BZ2,
        "xz_bits_per_byte": XZ,
        "num_documents": documents,
        "num_tokens": documents * 11_000,
        "num_bytes": documents * 18_900,
        "num_positions": documents * 21_000,
        "seconds": seconds,
    }


SAMPLE = '''_get_name(self, name):
        """Return the name of the file <name> & its path."""
        if not isinstance(name, str):
            raise TypeError("name must be a string")
        for i in range(len(name)):
            if name[i] == '.':
                return name[:i]
        return None

    def __repr__(self):
        return '<%s: %r>' % (self.__class__.__name__, self.name)
'''
JOB = tomllib.loads("""
[model]
family = "llama"
vocab_size = 2048
hidden_size = 128
num_layers = 4
num_heads = 4
num_kv_heads = 2
head_dim = 32
intermediate_size = 384
max_seq_len = 512
rope_theta = 10000.0
norm_eps = 1e-5
tie_embeddings = true
qk_norm = true
initializer_range = 0.02

[data]
corpus = ["python"]
weights = [1.0]
tokenizer = "bpe"
seq_len = 512
mask_documents = false
validation_fraction = 0.02

[optimizer]
name = "muon"
lr = 3e-3
matrix_lr = 0.02
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
schedule = "wsd"
warmup_steps = 90
decay_fraction = 0.3
final_lr_fraction = 0.02

[layout]
dp_replicate = 1
dp_shard = 1
micro_batch = 4
recompute = "none"
compile = false

[precision]
type = "fp32"

[checkpoint]
minutes = 10
keep = 2

[fleet]
device = "cpu"

[run]
minutes = 5
seed = 0
global_batch = 4
threads = 2
validate_every = 225
prompt = "def "
""")
ORIGINS = {"run.minutes": "argument", "run.seed": "file", "model.family": "preset"}
