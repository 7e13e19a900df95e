"""Which numbers a model computes with: fp32, or bf16 over fp32 weights."""

from __future__ import annotations

from colossus.precision.policy import apply_precision, torch_type

__all__ = ["apply_precision", "torch_type"]
