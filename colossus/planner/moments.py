"""Memory of our own program over several ranks, at the moments of a step when it may be most: the loss of the
last stage, the backward pass of a layer, the end of the step. What FSDP holds (PyTorch's `fully_shard`, which
several ranks always use) follows from `layout.zero`; `benchmarks.plan_memory` holds this to dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from colossus.perf.ledger import Columns

FP32 = 4.0
Moment = Literal["any", "backward", "loss"]


@dataclass(frozen=True)
class Held:
    """Of each pipeline rank and layout, [pp, n], or of each layout, [n].

    Numbers of weights: `weights` on the rank before sharding, `shards` after it, `edges` outside layers,
    `embedding` and `head` of the input's and output's matrices (`tied`: they are one), `layer` of the
    largest layer. recomputed: the share of layers that are computed once more. Bytes: `optimizer`;
    `activations` of all micro-batches that wait, of which one layer has left `of_layer`; `again` of a layer
    that is computed once more; `loss` of a chunk's logits; `output` of what the output matrix is multiplied
    with; `working` of a layer's backward pass; `update` of the optimizer's buckets; `size` of an element of
    these.
    summed: the share of the weights whose sums of gradients are there, where micro-batches follow.
    waiting: micro-batches of the last stage whose loss has its gradients already; put_off: in a backward
    pass, those of them whose gradients are used later; in_halves: the schedule puts them off.
    chunks: stages of a rank.
    """

    weights: NDArray[np.float64]
    shards: NDArray[np.float64]
    summed: NDArray[np.float64]
    edges: NDArray[np.float64]
    embedding: NDArray[np.float64]
    head: NDArray[np.float64]
    tied: bool
    layer: NDArray[np.float64]
    optimizer: NDArray[np.float64]
    activations: NDArray[np.float64]
    of_layer: NDArray[np.float64]
    again: NDArray[np.float64]
    recomputed: NDArray[np.float64]
    loss: NDArray[np.float64]
    output: Columns
    tp: Columns
    waiting: NDArray[np.float64]
    put_off: NDArray[np.float64]
    working: NDArray[np.float64]
    last: NDArray[np.float64]
    size: float
    in_halves: bool
    zero: Columns
    micro_batches: Columns
    chunks: Columns
    update: NDArray[np.float64]


def most(held: Held, moment: Moment = "any") -> dict[str, NDArray[np.float64]]:
    """Bytes by use at the moment when they are most, of those that `moment` names."""
    if moment == "loss":
        return _loss(held)
    # The first layer that is propagated back finds all that waits; the next one less, but sums on their way.
    follows = np.where(held.micro_batches > 1, held.edges, 0.0)
    first = _backward(held, held.activations, follows)
    second = _backward(held, held.activations - held.of_layer, held.layer)
    return largest([*([_loss(held)] if moment == "any" else []), first, second, *_end(held), _update(held)])


def largest(moments: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Of several moments the one at which a rank needs most."""
    totals = np.stack([np.sum(np.stack(list(moment.values())), axis=0) for moment in moments])
    which = np.argmax(totals, axis=0)
    return {
        name: np.choose(which, [np.broadcast_to(moment[name], which.shape) for moment in moments])
        for name in moments[0]
    }


def most_alone(held: Held) -> dict[str, NDArray[np.float64]]:
    """The same of one rank alone, which has no FSDP: its gradients are added as they come, and copies of
    weights in the type of products wait with the activations of layers that are not computed once more."""
    follows = held.micro_batches > 1
    cast = held.size if held.size < FP32 else 0.0
    waiting = cast * (held.weights - held.edges) * (1 - held.recomputed)
    at_work = np.where(held.recomputed > 0, cast * held.layer, 0.0)
    before = np.where(follows, FP32 * held.weights, 0.0)
    head = FP32 * held.head  # its gradient comes with the loss

    def moment(
        gradients: Columns, activations: Columns, one: Columns, copies: Columns
    ) -> dict[str, NDArray[np.float64]]:
        return {
            "weights": FP32 * held.weights,
            "gradients": gradients,
            "optimizer": held.optimizer,
            "activations": activations,
            "loss or one layer's gradients": one,
            "copies of weights": copies,
        }

    loss = held.loss + head + 2 * held.output
    first = held.working + np.where(follows & ~held.tied, 0.0, head)
    layer, none = FP32 * held.layer, np.zeros_like(held.activations)
    # Of an embedding that is the output matrix, too: the gradients of both, and then their sum.
    end = np.where(follows | held.tied, FP32 * held.embedding, 0.0) + (head if held.tied else 0.0)
    return largest(
        [
            moment(before, held.activations, loss, waiting + cast * held.head),
            moment(before, held.activations + held.again, first, waiting + at_work),
            moment(
                np.where(follows, before, layer),
                held.activations - held.of_layer + held.again,
                first + np.where(follows, layer, 0.0),
                waiting + at_work,
            ),
            moment(FP32 * held.weights, none, end, none),
            moment(FP32 * held.weights, none, held.update, none),
        ]
    )


def _sums(held: Held) -> NDArray[np.float64]:
    """Of gradients, while micro-batches follow: whole, or divided from ZeRO's second level on."""
    whole = np.where(held.zero >= 2, held.shards, held.weights) * FP32
    return np.where(held.micro_batches > 1, held.summed * whole, 0.0)


def _gathered(held: Held, layers: float) -> NDArray[np.float64]:
    """Copies of weights in the type of products: all, or those outside layers and of so many layers."""
    some = np.minimum(held.weights, held.edges + layers * held.layer)
    return held.size * np.where(held.zero >= 3, some, held.weights)


def _summing(held: Held, own: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gradients on their way, in fp32: FSDP lets go of what it has summed when it sums again. Each stage of a
    rank has an FSDP of its own. own: numbers of the stage at work."""
    others = held.edges + (held.chunks - 1) * held.layer
    apart = np.where(held.chunks > 1, others, own)
    only = (held.micro_batches == 1) & (not held.in_halves)  # else its gradients of weights come later
    return np.where((held.zero >= 2) | only, FP32 * apart, 0.0)


def _loss(held: Held) -> dict[str, NDArray[np.float64]]:
    # Of the last layer, as it was gathered.
    gathering = np.where((held.zero >= 3) | (held.micro_batches == 1), held.size * held.layer, 0.0)
    follows = (held.micro_batches > 1) & (held.waiting <= 1)  # a backward pass
    summing = np.where(follows, _summing(held, held.edges), 0.0)
    # The gradient of the output matrix's input, of each micro-batch that waits; under tp what was gathered.
    inputs = held.output * (held.waiting + 1 - 1 / held.tp)
    loss = held.last * (held.loss + held.waiting * FP32 * held.head + inputs)
    return {
        "weights": FP32 * held.shards,
        "gradients": _sums(held),
        "optimizer": held.optimizer,
        "activations": held.activations,
        "loss or one layer's gradients": loss,
        "copies of weights": _gathered(held, 0.0) + gathering + summing,
    }


def _backward(
    held: Held, activations: NDArray[np.float64], summed: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    # A stage's first sums are made beside the gradients that they are made of.
    begins = np.where((held.summed < 1) & (held.zero == 1), FP32 * held.layer, 0.0)
    one = held.working + held.size * held.layer + held.last * held.size * held.head
    one = one + held.put_off * (FP32 * held.head + held.output)  # which its gradients were made of
    return {
        "weights": FP32 * held.shards,
        "gradients": _sums(held) + np.where(held.micro_batches > 1, begins, 0.0),
        "optimizer": held.optimizer,
        "activations": activations + held.again,
        "loss or one layer's gradients": one,
        "copies of weights": _gathered(held, 2.0) + _summing(held, summed),
    }


def _end(held: Held) -> list[dict[str, NDArray[np.float64]]]:
    """Of the last backward pass, when nearly all gradients are there and no activations: the sum of its last
    layer, and that of the weights outside layers, which lets go of what was gathered of them first."""
    shards = held.edges * held.shards / held.weights  # of the weights outside layers
    sums = (held.zero == 1) & (held.micro_batches > 1)  # whole, in fp32
    own = np.where(sums, FP32, held.size)
    at_edges = FP32 * held.edges + np.maximum(0.0, own * held.edges - FP32 * shards)
    at_layer = FP32 * held.layer + held.size * held.edges

    def moment(gradients: Columns, one: Columns, copies: Columns) -> dict[str, NDArray[np.float64]]:
        return {
            "weights": FP32 * held.shards,
            "gradients": FP32 * gradients,
            "optimizer": held.optimizer,
            "activations": np.zeros_like(held.activations),
            "loss or one layer's gradients": one,
            "copies of weights": copies,
        }

    return [
        moment(held.shards, np.zeros_like(held.activations), at_edges),
        moment(held.shards - shards, own * held.layer + held.last * own * held.head, at_layer),
    ]


def _update(held: Held) -> dict[str, NDArray[np.float64]]:
    """Of the optimizer, whose buckets take the place of the layer that was gathered last."""
    return {
        "weights": FP32 * held.shards,
        "gradients": FP32 * held.shards,
        "optimizer": held.optimizer + held.update,
        "activations": np.zeros_like(held.activations),
        "loss or one layer's gradients": np.zeros_like(held.activations),
        "copies of weights": np.zeros_like(held.activations),
    }
