"""How many tokens a step can use: the law of the critical batch that plans take where a job says nothing.

Zhang et al. 2024 (arXiv 2410.21676) trained models of 85M to 1.2B weights on C4 to equal losses, with batches
of 64 to 16,384 sequences of 512 tokens. A batch is critical where the loss takes 20% more tokens than small
batches need; it grows with the tokens D of the run, hardly with the model: 22.91 (D/1e6)^0.47 sequences.
Published runs took from 0.46 (Nemotron-4 340B) to 2.3 times (DeepSeek-V3) as much.
"""

from __future__ import annotations

import math

SEQUENCES, EXPONENT, SEQUENCE_TOKENS = 22.91, 0.47, 512  # of the law
OVERHEAD = 0.2  # more tokens for the same loss, at the critical batch
GRAIN = 4  # batches are whole multiples of a quarter of a power of two, so that ranks can share them


def critical_batch_tokens(tokens: float) -> float:
    """Tokens of a step beyond which more of them hardly save steps, in a run of so many tokens."""
    return SEQUENCES * (tokens / 1e6) ** EXPONENT * SEQUENCE_TOKENS


def more_tokens(batch_tokens: float, tokens: float) -> float:
    """What share of tokens more such a batch takes to the loss that small ones reach: in proportion to the
    batch (as in McCandlish et al. 2018, arXiv 1812.06162), 20% at the critical one. Beyond twice that, the
    law's own runs took still more."""
    return OVERHEAD * batch_tokens / critical_batch_tokens(tokens)


def tokens_of_steps(steps: int) -> float:
    """Tokens of a run of so many steps, each of the critical batch of that run."""
    return float((steps * critical_batch_tokens(1e6) / 1e6) ** (1 / (1 - EXPONENT)) * 1e6)


def default_batch(tokens: float, seq_len: int) -> int:
    """Sequences of a step: the most of 4 to 7 times a power of two that is not above the critical batch."""
    most = max(1.0, critical_batch_tokens(tokens) / seq_len)
    grain = max(1, 2 ** math.floor(math.log2(most)) // GRAIN)
    return int(most // grain) * grain
