"""How initial values and learning rates follow the width and the depth of a model.

Width: the rules of muP (Yang et al. 2022, arXiv 2203.03466, table 3), under which the rate that is best at
one width is best at another. They are relative to a base width, where they change nothing, and need no
factors in the forward pass, so that a trained model is a plain one of its family. With r = width / base
width, the sides of all matrices growing together and heads keeping their width:

| group           | initial values | AdamW's rate | Muon's rate |
|-----------------|----------------|--------------|-------------|
| matrix, expert  | r^-1/2         | r^-1         | r^-1/2      |
| head, router    | r^-1           | r^-1         |             |
| the others      | 1              | 1            |             |

Muon: the spectral norm of an update should be proportional to sqrt(fan_out / fan_in) (Yang et al. 2023, arXiv
2310.17813, condition 1), the same at all widths where both sides grow together. Its updates, orthogonal and
of size 0.2 sqrt(larger side), have a norm that grows with r^1/2.

Tied embeddings: one matrix reads in (rate and initial values 1) and reads out, where muP divides its output
by r (the same, figure 3 and appendix B). The norm before it takes that division: its weights begin at 1/r and
have r^-1 of the rate, so the products are the same and no factor is left in the forward pass.

Weight decay shrinks weights by rate x decay a step. That product stays the same at all widths, as in the
authors' own code: how long a weight remembers is then no matter of width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

InitScheme = Literal["gpt2", "llama", "plain"]

READS_OUT = ("head", "router")  # from many to few: outputs are sums over the width
INNER = ("matrix", "expert")


@dataclass(frozen=True)
class Scale:
    """Factors on a parameter's initial values and on its rates, 1 at the base width."""

    init: float = 1.0
    adamw: float = 1.0
    muon: float = 1.0


UNSCALED = Scale()


def width_scale(group: str, ratio: float, *, norm_of_tied: bool = False) -> Scale:
    """Of a parameter of `group` in a model that is `ratio` times as wide as its base.

    norm_of_tied: it belongs to the norm before an output matrix that is the embedding.
    """
    if norm_of_tied:
        return Scale(1 / ratio, 1 / ratio)
    if group in READS_OUT:
        return Scale(1 / ratio, 1 / ratio)
    if group in INNER:
        return Scale(1 / math.sqrt(ratio), 1 / ratio, 1 / math.sqrt(ratio))
    return UNSCALED


def depth_scale(scheme: InitScheme, layer: int, num_layers: int) -> float:
    """Of the initial values of the matrices that a scheme makes smaller, so that the sum of all layers'
    outputs does not grow with their number. layer: counted from 0.

    gpt2: by all layers, two outputs each (Radford et al. 2019, section 2.3).
    llama: by the layers up to this one (`depth_init` of torchtitan's Llama 3, `llama_depth` of OLMo-core).
    """
    if scheme == "gpt2":
        return 1 / math.sqrt(2 * num_layers)
    if scheme == "llama":
        return 1 / math.sqrt(2 * (layer + 1))
    return 1.0
