"""What the libraries of products are held to is part of the machine that is measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from colossus.measure.instructions import held_to, instructions

SHOW = """
from colossus.measure.machine import processor_name, table_path
print(processor_name())
print(table_path().name)
"""
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


def shown(code: str = SHOW, **variables: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if "ISA" not in name and "MKL" not in name}
    kept.pop("ATEN_CPU_CAPABILITY", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def free() -> list[str]:
    return shown()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ONEDNN_MAX_CPU_ISA", "avx2", "oneDNN held to AVX2"),
        ("DNNL_MAX_CPU_ISA", "AVX2", "oneDNN held to AVX2"),
        ("ATEN_CPU_CAPABILITY", "default", "ATen held to DEFAULT"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2", "MKL held to AVX2"),
    ],
)
def test_each_variable_names_another_table(free: list[str], variable: str, value: str, said: str) -> None:
    processor, table = shown(**{variable: value})
    assert processor == f"{free[0]}, {said}" and table != free[1]


def test_what_torch_itself_was_held_to_is_seen() -> None:
    assert shown(CAPABILITY, ATEN_CPU_CAPABILITY="default") == ["DEFAULT"]
    held = {name: value for name, value in os.environ.items() if name == "ATEN_CPU_CAPABILITY"}
    assert instructions().split()[0] == shown(CAPABILITY, **held)[0]


def test_values_that_hold_nothing_are_none() -> None:
    assert held_to({"ONEDNN_MAX_CPU_ISA": "ALL", "MKL_ENABLE_INSTRUCTIONS": "", "MKL_CBWR": "off"}) == {}
    assert held_to({"ATEN_CPU_CAPABILITY": "default"}) == {"ATen": "DEFAULT"}


def test_the_newer_name_of_onednn_s_variable_counts() -> None:
    both = {"DNNL_MAX_CPU_ISA": "SSE41", "ONEDNN_MAX_CPU_ISA": "avx512_core"}
    assert held_to(both) == {"oneDNN": "AVX512_CORE"}


def test_other_arithmetic_is_another_machine() -> None:
    assert held_to({"ONEDNN_DEFAULT_FPMATH_MODE": "bf16"}) == {"oneDNN's arithmetic": "BF16"}
