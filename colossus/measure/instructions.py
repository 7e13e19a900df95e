"""Which vector instructions the libraries of matrix products may use here: rates depend on them."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

# Variables that hold a library to fewer instructions, or to other arithmetic; the first that is set counts.
HOLD = {
    "ATen": ("ATEN_CPU_CAPABILITY",),
    "oneDNN": ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    "oneDNN's hints": ("ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    "oneDNN's arithmetic": ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    "MKL": ("MKL_ENABLE_INSTRUCTIONS",),
    "MKL's branch": ("MKL_CBWR",),
}
UNHELD = {"", "ALL", "DEFAULT", "NO_HINTS", "STRICT", "OFF"}  # values that say nothing
ATEN_UNHELD = {""}  # there, "default" is the least of all
# Those that change how quick products are, as the system calls them: a hypervisor may hide any of them.
FEATURES = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_fp16",
    "asimd", "sve", "sve2", "bf16", "svebf16", "i8mm", "sme",
)  # fmt: skip


def held_to(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Library -> what the environment holds it to, in capitals; empty where nothing is held."""
    found = {}
    for library, variables in HOLD.items():
        value = next((environment[name] for name in variables if name in environment), "").strip().upper()
        if value not in (ATEN_UNHELD if library == "ATen" else UNHELD):
            found[library] = value
    return found


def instructions() -> str:
    """What ATen uses, and what the processor shows of the instructions that matter to products."""
    capability = torch.backends.cpu.get_cpu_capability()
    return " ".join([capability, *_shown()])


def _shown() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return [feature for feature in FEATURES if feature in value.split()]
    return [platform.machine()]
