"""Where a step loses the peak: seconds by what they are, less the model's FLOPs at the peak."""

from __future__ import annotations

from colossus.architecture import Architecture
from colossus.perf.flops import attention_forward_flops, forward_flops_per_token
from colossus.planner.choice import Choice

BELOW = {"products": "products below the peak", "attention": "attention below the peak"}


def losses(choice: Choice, arch: Architecture, seq_len: int) -> dict[str, float]:
    """Points of MFU that each sort of work costs: of products and attention what they take beyond their FLOPs
    at the peak. With the MFU they sum to 100, but where a pipeline's slowest rank has less of the model's
    products than the mean."""
    points = {name: 100 * value / choice.seconds for name, value in choice.parts.items()}
    share = attention_forward_flops(arch, seq_len, causal=True) / forward_flops_per_token(arch, seq_len)
    of_attention = min(100 * share * choice.mfu, points["attention"])
    points["attention"] -= of_attention
    points["products"] = max(0.0, points["products"] - (100 * choice.mfu - of_attention))
    return {BELOW.get(name, name): value for name, value in points.items()}
