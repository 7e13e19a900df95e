"""What a model is worth: bits per byte on held-out documents, beside what compressors reach on them."""

from __future__ import annotations

from colossus.evaluation.bits_per_byte import Validation, ValidationResult, evaluate

__all__ = ["Validation", "ValidationResult", "evaluate"]
