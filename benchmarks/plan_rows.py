"""Published runs as problems for the planner: what a row says, and what it leaves out.

A row is complete when architecture, sequence, batch, layout, hardware and a measured time are there
(`incomplete` says what is missing). Recomputation and virtual stages that a source doesn't name are taken as
its software has them by default, all of them in turn.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from colossus.architecture import Architecture, Experts, Latent
from colossus.errors import UserError
from colossus.hardware.catalogue import accelerator
from colossus.hardware.fleets import Hardware, Pool, hardware_of
from colossus.perf import software as programs
from colossus.perf.software import Software
from colossus.sections import Fleet

FOLDER = Path(__file__).parent / "published"
GPUS = {
    "H100-SXM": "h100-sxm",
    "A100": "a100-sxm-80",
    "A100-80G": "a100-sxm-80",
    "A100-40G": "a100-sxm-40",
    "H200": "h200-sxm",
    "H800": "h800-sxm",
    "B200": "b200-sxm",
    "B300": "b300-sxm",
    "GB200": "gb200",
    "GB300": "gb300",
}
NVLINK_DOMAIN = {"gb200": 72, "gb300": 72}
PROGRAMS = {  # by how a source's name begins
    "NVIDIA dgxc": programs.MEGATRON_CORE,
    "Megatron-Bridge": programs.MEGATRON_BRIDGE,
    "NeMo AutoModel": programs.FSDP,
    "NeMo Launcher": programs.NEMO_2023,
    "NeMo": programs.MEGATRON_CORE,
    "MLPerf": programs.MEGATRON_CORE,
    "Megatron-LM README (": programs.MEGATRON_CORE,
    "Megatron-LM examples": programs.MEGATRON_CORE,
    "Nemotron": programs.MEGATRON_CORE,
    "DeepSeek": programs.MEGATRON_CORE,
    "SimuMax": replace(programs.MEGATRON_CORE, name="Megatron-Core without user buffers", tp_hidden=0.0),
    "Google gpu-recipes": programs.MEGATRON_CORE,
    "Narayanan": programs.MEGATRON_2021,
    "Korthikanti": programs.MEGATRON_2021,
    "vTrain": programs.MEGATRON_DEEPSPEED,
    "BigScience": programs.MEGATRON_DEEPSPEED,
    "BLOOM": programs.MEGATRON_DEEPSPEED,
    "MosaicML": programs.LLM_FOUNDRY,
    "FlashAttention": programs.FSDP,
    "nanotron": replace(programs.FSDP, name="nanotron"),
    "torchtitan": programs.TITAN,
    "Llama 3 ": programs.META,
}
NVIDIA = ("NVIDIA dgxc", "Megatron-Bridge", "NeMo docs", "NeMo Framework", "MLPerf", "Google gpu-recipes")
GELU = ("gpt", "mpt", "nemotron", "bloom", "opt", "pythia", "bigscience", "mt-nlg", "176b", "200b")
LATENT = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)


@dataclass(frozen=True)
class Run:
    """A measured run. variants: the layouts that it may have had: one, where its source says all."""

    id: str
    source: str
    group: str
    set: str
    arch: Architecture
    seq_len: int
    global_batch: int
    precision: str
    hardware: Hardware
    software: Software
    variants: tuple[Mapping[str, Any], ...]
    seconds: float
    peak_bytes: float | None

    @property
    def calibrates(self) -> bool:
        """Whether its group is one that scalars are fitted to; by hash, so that nobody chooses."""
        return int(hashlib.sha256(self.group.encode()).hexdigest(), 16) % 2 == 0

    @property
    def problem_key(self) -> tuple[Any, ...]:
        return (self.arch, self.seq_len, self.global_batch, self.precision, self.software, self.hardware)

    @property
    def alike(self) -> tuple[Any, ...]:
        """Runs that differ in layout alone share this."""
        return (self.source, *self.problem_key)


def load(path: Path | None = None) -> Iterator[Run]:
    """The complete rows of a file; by default of all published ones."""
    with (path or FOLDER / "runs.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if incomplete(row) is None:
                yield _run(row)
    if path is None:
        yield from _vtrain()


def incomplete(row: Mapping[str, str]) -> str | None:
    """What is missing of a row to predict it; None where it is complete."""
    if row["task"] not in ("pretrain", "pretrain (MLPerf, from checkpoint)"):
        return "no pre-training"
    if not row["verified"].startswith("source text"):
        return "a second-hand quotation"
    needed = ("layers", "hidden", "heads", "ffn_hidden", "vocab", "seq_len", "global_batch_seqs",
              "micro_batch", "n_gpus", "tp", "pp")  # fmt: skip
    for name in needed:
        if not row[name]:
            return name
    if row["family"] == "moe":
        for name in ("n_experts", "top_k", "expert_ffn", "ep"):
            if not row[name]:
                return name
    if row["gpu"] not in GPUS:
        return f"the tensor peak of {row['gpu']}"
    if _precision(row["precision"]) is None:
        return f"a price of {row['precision'] or 'no named precision'}"
    if "offload" in row["fsdp_zero"]:
        return "a price of offloading"
    if _program(row["source"]) is None:
        return "its program"
    if _seconds(row) is None:
        return "a measured time"
    ranks = int(row["tp"]) * int(row["pp"]) * int(row["cp"] or 1)
    if int(row["n_gpus"]) % ranks:
        return "a layout that fills its GPUs"
    return None


def _program(source: str) -> Software | None:
    return next((program for start, program in PROGRAMS.items() if source.startswith(start)), None)


def _precision(text: str) -> str | None:
    lower = text.lower()
    if "nvfp4" in lower:
        return None
    if "fp8" in lower:
        return "fp8"
    return "bf16" if "bf16" in lower or "fp16" in lower else None


def _seconds(row: Mapping[str, str]) -> float | None:
    """Of a step, from the first metric that gives it."""
    tokens = float(row["global_batch_seqs"]) * float(row["seq_len"])
    pairs = (("reported_metric", "reported_value"), ("second_metric", "second_value"),
             ("third_metric", "third_value"))  # fmt: skip
    for metric, value in pairs:
        name = row[metric]
        if not row[value]:
            continue
        if name.startswith("step_time_s"):
            return float(row[value])
        if name.startswith("step_time_ms"):
            return float(row[value]) / 1e3
        if name == "tokens_per_s_per_gpu":
            return tokens / float(row[value]) / float(row["n_gpus"])
        if name == "tokens_per_s":
            return tokens / float(row[value])
        if name == "samples_per_s":
            return float(row["global_batch_seqs"]) / float(row[value])
    return None


def _run(row: Mapping[str, str]) -> Run:
    arch = architecture(row)
    part = GPUS[row["gpu"]]
    software = _program(row["source"])
    assert software is not None
    if "DeepSpeed)" in row["fsdp_zero"] and "zero3" in row["fsdp_zero"]:
        software = programs.DEEPSPEED_2021
    if "maxtext" in row["source_location"]:
        software = programs.MAXTEXT
    seconds = _seconds(row)
    assert seconds is not None
    n, tp, pp, cp = (int(row[name] or 1) for name in ("n_gpus", "tp", "pp", "cp"))
    shard, zero = _sharding(row, n // (tp * pp * cp))
    layout = {
        "tp": tp, "pp": pp, "cp": cp, "ep": int(row["ep"] or 1) if row["family"] == "moe" else 1,
        "micro_batch": int(row["micro_batch"]), "zero": zero, "dp_shard": shard,
        "dp_replicate": n // (tp * pp * cp) // shard,
        "sp": 1.0 if row["sp"] == "yes" or (tp > 1 and row["sp"] == "") else 0.0,
    }  # fmt: skip
    return Run(
        id=row["id"],
        source=row["source"],
        group=group(row["source"], row["model_name"]),
        set=_set(row),
        arch=arch,
        seq_len=int(row["seq_len"]),
        global_batch=int(row["global_batch_seqs"]),
        precision=_precision(row["precision"]) or "bf16",
        hardware=hardware(part, n, float(row["interconnect_per_gpu_Gbps"] or 0)),
        software=software,
        variants=tuple(_variants(row, layout, software)),
        seconds=seconds,
        peak_bytes=float(row["peak_memory_GB"]) * 2**30 if row["peak_memory_GB"] else None,
    )


def group(source: str, model: str) -> str:
    """(publisher, model): releases of one benchmark, and cut-down versions of a model, are near-copies."""
    publisher = "NVIDIA" if source.startswith(NVIDIA) else source.split("(")[0].strip()
    name = re.sub(r"\(.*?\)|\[.*?\]|proxy.*|truncated.*", "", model.lower())
    name = re.sub(r"[^a-z0-9.]+", "", name).replace("llama3.1", "llama3").replace("nemotron4", "nemotron")
    return f"{publisher}|{name}"


def _set(row: Mapping[str, str]) -> str:
    """What a run is reported under."""
    if row["source"].startswith("vTrain"):
        return "vTrain, many nodes"
    generation = accelerator(GPUS[row["gpu"]]).generation
    names = {"ampere": "A100", "hopper": "Hopper", "blackwell": "Blackwell"}
    kind = "experts" if row["family"] == "moe" else "dense"
    return f"{names[generation]} {kind}"


def _sharding(row: Mapping[str, str], dp: int) -> tuple[int, float]:
    """Ranks over which something is sharded, and what: see `planner.columns.Layouts`."""
    text = row["fsdp_zero"].lower()
    if "none" in text or "zero0" in text:
        return 1, 0.0
    if "zero2" in text:
        return dp, 2.0
    found = re.search(r"fsdp2?=(\d+)", text)
    if "zero3" in text or found:
        return min(dp, int(found[1])) if found else dp, 3.0
    if not text:
        return (
            (dp, 1.0)
            if _program(row["source"]) in (programs.MEGATRON_CORE, programs.MEGATRON_BRIDGE)
            else (1, 0.0)
        )
    return dp, 1.0


def _variants(row: Mapping[str, str], layout: dict[str, Any], software: Software) -> Iterator[dict[str, Any]]:
    """The layout with what its source leaves out filled in, each way that its program has by default."""
    layers, pp = int(row["layers"]), layout["pp"]
    if row["vpp"]:
        per_rank = [max(1, int(row["vpp"]))]
    elif pp > 1 and software in (programs.MEGATRON_CORE, programs.MEGATRON_BRIDGE):
        per_rank = sorted({1, max(1, layers // pp // 2)})  # none, or two layers a stage
    else:
        per_rank = [1]
    text = row["activation_recompute"].lower()
    if text:
        ways = ["none" if text == "none" else "selective" if "selective" in text else "full"]
        if "(op" in text:  # torchtitan keeps every other product: between keeping all and making all again
            ways = ["selective", "full"]
    else:
        # Megatron-Core's default with flash attention, and the others', is none; NeMo's configurations of
        # 2022 and 2023 made the core of attention again; MaxText has a policy for it, of which none is named
        defaults = {programs.NEMO_2023: ["selective"], programs.MAXTEXT: ["selective", "full"]}
        ways = defaults.get(software, ["none"])
    etps = [1, layout["tp"]] if row["family"] == "moe" and layout["tp"] > 1 else [1]
    if row["family"] == "moe" and "tag v24" in row["source_location"]:
        etps = [layout["tp"]]  # NeMo of 2024 had no other size for experts
    for stages in per_rank:
        stages = min(stages, max(1, (layers + 2) // pp))
        schedule = "interleaved_1f1b" if stages > 1 and pp > 1 else "1f1b"
        for way in ways:
            for etp in etps:
                yield layout | {
                    "schedule": schedule, "stages_per_rank": stages, "recompute": way, "etp": etp,
                }  # fmt: skip


@lru_cache(maxsize=256)
def hardware(part: str, count: int, gbps: float) -> Hardware:
    """Accelerators of a kind, with the network that the row names or its server has."""
    found = hardware_of(Fleet(accelerator=part, count=count))
    nic = gbps / 8 * 1e9 if gbps else found.nic
    size = NVLINK_DOMAIN.get(part, 8)
    return replace(found, nic=nic, node_size=size, pools=(Pool(accelerator(part), count),))


def architecture(row: Mapping[str, str]) -> Architecture:
    """The model of a row. What it doesn't say follows from its family."""
    name = row["model_name"].lower()
    hidden, heads = int(row["hidden"]), int(row["heads"])
    kv = int(row["kv_heads"] or heads)
    values: dict[str, Any] = {
        "vocab_size": int(row["vocab"]), "hidden_size": hidden, "num_layers": int(row["layers"]),
        "num_heads": heads, "num_kv_heads": kv, "head_dim": hidden // heads,
        "intermediate_size": int(row["ffn_hidden"]), "max_seq_len": int(row["seq_len"]),
        "tie_embeddings": False, "qk_norm": False,
    }  # fmt: skip
    if name.startswith(GELU) and "oss" not in name:
        tied = not name.startswith("nemotron")
        values |= {"mlp": "gelu", "norm": "layer", "tie_embeddings": tied}
    if "oss" in name:
        values |= {"head_dim": 64, "window": 128, "full_attention_every": 2, "attention_sinks": True}
    if "qwen" in name:
        values |= {"head_dim": 128, "qk_norm": True}
    if "deepseek" in name or "kimi" in name:
        values |= {"latent": LATENT, "head_dim": 192, "num_kv_heads": heads}
    if row["family"] == "moe":
        size = int(row["expert_ffn"])
        shared = int(row["shared_expert_ffn"] or 0) // size
        dense = 0
        if "deepseek" in name or "kimi" in name:
            dense = 3 if "v3" in name and "truncated" not in name else 1
        values["experts"] = Experts(
            num_experts=int(row["n_experts"]), per_token=int(row["top_k"]), intermediate_size=size,
            num_shared=shared, dense_layers=dense,
        )  # fmt: skip
    return Architecture(**values)


def _vtrain() -> Iterator[Run]:
    """Single-node iterations. The file names neither vocabulary nor recomputation: GPT-2's tokens, as in the
    multi-node rows of its authors, padded as Megatron does, and Megatron's default, which is none (with full
    recomputation the larger batches would reach 64% of an A100's peak in all)."""
    with (FOLDER / "vtrain_single_node.csv").open(newline="", encoding="utf-8") as file:
        _, header, *lines = file
    names = header.strip("# \n").split(",")
    for i, row in enumerate(csv.DictReader(lines, names)):
        layers, hidden, heads = (int(row[name]) for name in ("# layers", "hidden size", "attention heads"))
        seq_len = int(row["sequence length"])
        try:
            arch = Architecture(
                vocab_size=51200, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads,
                head_dim=hidden // heads, intermediate_size=4 * hidden, max_seq_len=seq_len, mlp="gelu",
                norm="layer", tie_embeddings=True, qk_norm=False, position="learned",
            )  # fmt: skip
        except UserError:
            continue
        layout = {
            "tp": int(row["tensor parallelism"]), "pp": int(row["pipeline parallelism"]),
            "dp_replicate": int(row["data parallelism"]), "micro_batch": int(row["micro batch"]),
            "zero": 0.0, "sp": 0.0, "schedule": "1f1b", "recompute": "none",
        }  # fmt: skip
        gpus = int(row["GPUs"])
        yield Run(
            id=f"V{i:04d}", source="vTrain single node",
            group=f"vTrain single node|{layers} x {hidden} / {heads}", set="vTrain, one node", arch=arch,
            seq_len=seq_len, global_batch=int(row["global batch"]), precision="bf16",
            hardware=hardware("a100-sxm-80", gpus, 100.0), software=programs.MEGATRON_DEEPSPEED,
            variants=(layout,), seconds=float(row["iteration time (ms)"]) / 1e3, peak_bytes=None,
        )  # fmt: skip
