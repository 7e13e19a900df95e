"""How long messages between ranks take: latency and bandwidth by where the ranks of a group sit.

Ranks are numbered node by node. A group of n ranks that lie `stride` apart has `members` of them in each
node; what leaves a node goes through the cards of those members alone. Beyond a pod the network may be
oversubscribed. Sources of the constants: `hardware/catalogue/networks.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from colossus.hardware.fleets import Hardware
from colossus.perf.ledger import Columns

# H100, 8 GPUs, nccl-tests: an all-gather or ring moves 361 to 363 GB/s of 450; an A100 230 of 300.
NVLINK_SHARE = 0.80
# NVLS sums inside the switch: 480 against the ring's 365 GB/s for large tensors, all-reduce alone.
NVLS_GAIN = 1.3
START = 12e-6  # of a collective: 13.7 us for 8 bytes over 8 GPUs, less what the ring itself takes
NVLINK_HOP = 1.9e-6  # NCCL's own cost model: ring over NVLink, LL128
NETWORK_HOP = 14e-6  # the same for the network, Simple
TREE_HOPS = 2.0  # a tree, or PAT, goes up and down: hops grow with the logarithm of the nodes
FILL = (
    16 * 2**20
)  # bytes that are on their way before a ring inside a node runs at its rate: beside its rate at
# 8 GiB, an all-reduce loses 43, 71, 143, 200 us at 1, 4, 16, 64 MiB on A100, 23, 39, 63, 80 us on H100
SEND_START = 10e-6


@dataclass(frozen=True)
class Group:
    """A process group, as columns [N]: how many ranks, and how far apart."""

    size: Columns
    stride: Columns


Groups = Mapping[str, Group]


def groups_of(axes: Mapping[str, Columns], order: tuple[str, ...]) -> dict[str, Group]:
    """The groups of a layout. axes: ranks of dp_replicate, dp_shard, pp, cp, tp; of ep and etp inside them.

    order: of the axes over ranks, the quickest-varying first. `fsdp` is dp_shard x cp, over which weights are
    sharded; `experts` is what remains of it for the weights of experts.
    """
    stride: dict[str, Columns] = {}
    ranks = np.ones_like(axes["tp"])
    for axis in order:
        stride[axis] = ranks
        ranks = ranks * axes[axis]
    groups = {axis: Group(axes[axis], stride[axis]) for axis in order}
    groups["fsdp"] = Group(axes["dp_shard"] * axes["cp"], np.minimum(stride["cp"], stride["dp_shard"]))
    groups["dp"] = Group(
        axes["dp_replicate"] * axes["dp_shard"] * axes["cp"],
        np.minimum(stride["cp"], np.minimum(stride["dp_shard"], stride["dp_replicate"])),
    )
    split = np.where(axes["etp"] > 1, axes["tp"], 1.0)
    groups["ep"] = Group(axes["ep"], split)
    over = axes["dp_shard"] * axes["cp"] * axes["tp"] / (axes["ep"] * split)
    groups["experts"] = Group(over, split * axes["ep"])
    groups["experts_dp"] = Group(over * axes["dp_replicate"], split * axes["ep"])
    return groups


@dataclass(frozen=True)
class Wire:
    """What carries the messages of groups, as columns [N]."""

    members: Columns  # of a group in one node
    nodes: Columns
    inside: Columns  # bytes/s between two ranks of a node
    outside: Columns  # bytes/s of one rank's share of the cards, oversubscription counted


def wire(group: Group, hardware: Hardware, nic_share: float) -> Wire:
    """Where the ranks of a group sit, and what joins them. nic_share: of a card's rate that is reached."""
    per_node = np.maximum(1.0, np.floor(hardware.node_size / group.stride))
    members = np.minimum(group.size, per_node)
    nodes = np.ceil(group.size / members)
    span = group.size * group.stride
    beyond = np.where(span > hardware.pod, hardware.oversubscription, 1.0)
    nvlink = hardware.accelerator.nvlink * NVLINK_SHARE
    return Wire(
        members=members,
        nodes=nodes,
        inside=np.full_like(members, nvlink),
        outside=hardware.nic * nic_share / beyond,
    )


def gather_seconds(sent: Columns, group: Group, hardware: Hardware, nic_share: float) -> Columns:
    """An all-gather or reduce-scatter of a tensor of `sent` bytes."""
    w = wire(group, hardware, nic_share)
    n = np.maximum(group.size, 1.0)
    # A ring enters each node once; its `members` rings there share the node's cards.
    rate = np.where(w.nodes > 1, np.minimum(w.inside, w.members * w.outside), w.inside)
    share = (n - 1) / n * sent
    return np.where(n > 1, share / rate + _start(sent, w), 0.0)


def _start(sent: Columns, w: Wire) -> Columns:
    """Hops of a ring or of a tree, whichever is quicker, and the time until a pipeline of blocks is full."""
    ring = w.nodes * NETWORK_HOP
    tree = TREE_HOPS * np.log2(np.maximum(w.nodes, 1.0)) * NETWORK_HOP + NETWORK_HOP
    hops = np.where(w.nodes > 1, np.minimum(ring, tree), 0.0) + (w.members - 1) * NVLINK_HOP
    fill = np.minimum(sent, FILL) / w.inside
    return START + hops + fill


def reduce_seconds(sent: Columns, group: Group, hardware: Hardware, nic_share: float) -> Columns:
    """An all-reduce: a reduce-scatter and an all-gather, or the switch's own sum inside a node."""
    ring = 2 * gather_seconds(sent, group, hardware, nic_share)
    if not hardware.accelerator.name.startswith(("h", "b", "g")):
        return ring
    w = wire(group, hardware, nic_share)
    return np.where((w.nodes == 1) & (group.size >= 5), ring / NVLS_GAIN, ring)


def exchange_seconds(
    sent: Columns, group: Group, hardware: Hardware, nic_share: float, copies: Columns | float = 0.0
) -> Columns:
    """An all-to-all in which each rank has `sent` bytes, of which 1/n stays.

    copies: of each token among them, where those for one node travel there once (DeepEP); 0: all travel.
    """
    w = wire(group, hardware, nic_share)
    n = np.maximum(group.size, 1.0)
    away = sent * (1 - w.members / n) / w.outside
    if np.any(copies):
        # of so many experts at random, the nodes that they lie on
        reached = (w.nodes - 1) * (1 - (1 - 1 / w.nodes) ** copies)
        away = away * reached / np.maximum(copies * (1 - 1 / w.nodes), 1e-9)
    near = sent * (w.members - 1) / n / w.inside
    start = START + np.minimum(n, 64.0) * NVLINK_HOP + np.where(w.nodes > 1, NETWORK_HOP, 0.0)
    return np.where(n > 1, np.maximum(away, near) + start, 0.0)


def send_seconds(sent: Columns, group: Group, hardware: Hardware, nic_share: float) -> Columns:
    """A message to the next rank of a group: over NVLink where both sit in one node."""
    w = wire(group, hardware, nic_share)
    rate = np.where(group.size * group.stride <= hardware.node_size, w.inside, w.outside)
    return np.where(group.size > 1, sent / rate + SEND_START, 0.0)
