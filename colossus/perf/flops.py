"""FLOPs a token, in one place: MFU, planner and ledger share it. A multiply-add is 2 FLOPs.

Convention: model FLOPs count 6 x the active parameters without the input embedding and with the output
head, and attention over the causal half of the square. Executed FLOPs are what PyTorch's kernels are
asked for: the whole square of attention, and recomputation where there is any.
"""

from __future__ import annotations

from colossus.architecture import Architecture, num_active, parameter_table


def matrix_parameters(arch: Architecture) -> int:
    """Parameters that a token is multiplied with: the matrices of the layers, and the output head."""
    groups = ("matrix", "expert", "router")
    layers = sum(round(p.numel * p.active) for p in parameter_table(arch) if p.group in groups)
    return layers + arch.vocab_size * arch.hidden_size


def attention_forward_flops(arch: Architecture, seq_len: int, *, causal: bool) -> float:
    """Scores and weighted values of one token: 4 x heads x head_dim x keys, halved where causal."""
    full = 4.0 * arch.num_layers * arch.num_heads * arch.head_dim * seq_len
    return full / 2 if causal else full


def forward_flops_per_token(arch: Architecture, seq_len: int) -> float:
    """Model FLOPs of one token's forward pass."""
    return 2.0 * _counted(arch) + attention_forward_flops(arch, seq_len, causal=True)


def model_flops_per_token(arch: Architecture, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward pass (the backward costs twice the forward)."""
    return 3.0 * forward_flops_per_token(arch, seq_len)


def executed_flops_per_token(arch: Architecture, seq_len: int, *, recompute: bool = False) -> float:
    """What the kernels execute a token: full-square attention, and the layers once more if recomputed."""
    layers = 2.0 * (matrix_parameters(arch) - arch.vocab_size * arch.hidden_size)
    layers += attention_forward_flops(arch, seq_len, causal=False)
    head = 2.0 * arch.vocab_size * arch.hidden_size
    return 3.0 * (layers + head) + (layers if recompute else 0.0)


def _counted(arch: Architecture) -> int:
    return num_active(arch, input_embedding=False)
