"""FLOPs a token, in one place: MFU, planner and ledger share it. A multiply-add is 2 FLOPs.

Convention: model FLOPs count 6 x the active parameters without the input embeddings and with the output
head, and attention over the causal half of the square, or over the window where that is less. Of experts
those count that a token visits. Executed FLOPs are what the kernels are asked for: all keys that they
multiply, also behind a mask, and recomputation where there is any. `perf.parts` has both part by part.
"""

from __future__ import annotations

from colossus.architecture import Architecture, parameter_table
from colossus.perf.parts import ATTENTION, MULTIPLIED, SQUARE, Kernel, parts


def matrix_parameters(arch: Architecture) -> int:
    """Parameters that a token is multiplied with: the layers' matrices, of experts those that it visits, the
    routers, and the output head."""
    table = parameter_table(arch)
    layers = sum(round(p.numel * p.active) for p in table if p.group in MULTIPLIED and p.group != "head")
    return layers + arch.vocab_size * arch.hidden_size


def attention_forward_flops(arch: Architecture, seq_len: int, *, causal: bool) -> float:
    """Scores and weighted values of one token over all layers: 2 x heads x (width of a key + of a value) x
    keys. causal: over what a token sees, as MFU counts it; else over the whole square."""
    rows = [part for part in parts(arch, seq_len) if part.name in ATTENTION]
    return sum(part.repeat * (part.model if causal else part.executed) for part in rows)


def forward_flops_per_token(arch: Architecture, seq_len: int) -> float:
    """Model FLOPs of one token's forward pass."""
    return sum(part.repeat * part.model for part in parts(arch, seq_len))


def model_flops_per_token(arch: Architecture, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward pass (the backward costs twice the forward)."""
    return 3.0 * forward_flops_per_token(arch, seq_len)


def executed_forward_flops(arch: Architecture, seq_len: int, *, kernel: Kernel = SQUARE) -> float:
    """What the matrix products of one token's forward pass execute."""
    return sum(part.repeat * part.executed for part in parts(arch, seq_len, kernel=kernel))


def executed_flops_per_token(
    arch: Architecture, seq_len: int, *, recompute: bool = False, kernel: Kernel = SQUARE
) -> float:
    """What the matrix products execute a token, forward and backward, and the layers once more if recomputed.

    kernel: how attention is computed; by default in plain products over the whole square.
    """
    table = parts(arch, seq_len, kernel=kernel)
    total = sum(part.repeat * (part.executed + part.executed_backward) for part in table)
    if recompute:
        total += sum(part.repeat * part.executed for part in table if part.kind is not None)
    return total


def saved_bytes_per_token(
    arch: Architecture, seq_len: int, *, kernel: Kernel = SQUARE, type_bytes: int = 4
) -> float:
    """Bytes of activations that wait for the backward pass, a token, nothing recomputed."""
    table = parts(arch, seq_len, kernel=kernel, type_bytes=type_bytes)
    return sum(part.repeat * part.saved_bytes for part in table)
