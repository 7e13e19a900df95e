"""What a model is worth: bits per byte of text, beside what compressors reach on it; the standard harness."""

from __future__ import annotations

from colossus.evaluation.bits_per_byte import Validation, ValidationResult, evaluate

__all__ = ["Validation", "ValidationResult", "evaluate"]
