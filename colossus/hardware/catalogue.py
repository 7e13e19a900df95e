"""The sourced catalogue: accelerators, servers, networks, money and failures, read from `catalogue/*.toml`.

Every group there has a `kind` (datasheet, measured, reported, shipped, second-hand, projected, assumed) and
a `source`. Here are the parts that are computed with, in SI units.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from colossus.errors import UserError

MIB = 2**20
COPY_SHARE = 0.8  # of a datasheet's memory bandwidth, where no copy was measured: between 0.79 and 0.87


@dataclass(frozen=True)
class Accelerator:
    """One accelerator. Rates in FLOP/s, dense; bandwidths in bytes/s, one direction; memory in bytes.

    bf16, fp8, fp32: peaks (0: the part has no such units). reachable: the share of the bf16 peak that the
    best of many measured shapes came to; reachable_fp8 likewise. memory: what a program can allocate from.
    copy: the memory bandwidth that a copy was measured at, reads and writes counted. dispatch: seconds that
    the host needs to start one kernel. measured, assumed: what of it is not the datasheet's. shared_by: ranks
    that share it, each with an equal part of its cores.
    """

    name: str
    title: str
    device: str
    bf16: float
    fp8: float
    fp32: float
    memory: float
    memory_bandwidth: float
    copy: float
    reachable: float
    reachable_fp8: float
    units: int
    nvlink: float
    watts: float
    idle_watts: float
    kind: str
    source: tuple[str, ...]
    measured: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    dispatch: float = 5e-6
    shared_by: int = 1

    @property
    def generation(self) -> str:
        """The family that calibrated scalars belong to."""
        for prefix, generation in GENERATIONS.items():
            if self.name.startswith(prefix):
                return generation
        return self.device

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of a precision; of float8 that of bf16 where the part has none."""
        if precision == "fp8":
            return self.fp8 or self.bf16
        return self.bf16 if precision == "bf16" else self.fp32

    def reach(self, precision: str) -> float:
        return self.reachable_fp8 if precision == "fp8" and self.fp8 else self.reachable


@dataclass(frozen=True)
class Node:
    """A server. nic: bytes/s of one compute card, one direction. watts: the rating of the whole server;
    training_share: what of it a training step was measured to draw."""

    name: str
    accelerator: str
    size: int
    nics: int
    nic: float
    watts: float
    kind: str
    source: tuple[str, ...]


SAME_MEMORY = {"h800-sxm": ("h100-sxm",)}
GENERATIONS = {
    "a100": "ampere",
    "h100": "hopper",
    "h200": "hopper",
    "h800": "hopper",
    "h20": "hopper",
    "gh200": "hopper",
    "b200": "blackwell",
    "b300": "blackwell",
    "gb200": "blackwell",
    "gb300": "blackwell",
    "mi3": "cdna3",
}


@lru_cache(maxsize=16)
def table(file: str) -> dict[str, Any]:
    """One file of the catalogue, as it is written."""
    path = resources.files("colossus") / "hardware" / "catalogue" / f"{file}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def accelerator_names() -> list[str]:
    """Those whose tensor peak is published."""
    return [name for name, row in table("accelerators")["accelerator"].items() if "bf16_TFLOPs" in row]


@lru_cache(maxsize=64)
def accelerator(name: str) -> Accelerator:
    """An accelerator of the catalogue.

    Raises:
        UserError: there is none of that name.
    """
    names = accelerator_names()
    if name not in names:
        raise UserError.field(
            "fleet.accelerator", name, f"no such accelerator; one of {', '.join(names)}", names
        )
    row = table("accelerators")["accelerator"][name]
    measured: list[str] = []
    assumed: list[str] = []
    reachable = {}
    base = name.partition("-")[0]
    for precision in ("bf16", "fp8"):
        peak = row.get(f"{precision}_TFLOPs") or 1.0
        best = table("measured")["measured"]["gemm_best_shape"][precision]
        found = next((best[key] / peak for key in _aliases(name) if key in best), None)
        held = table("measured")["measured"]["gemm_other"].get(f"{base}_{precision}_8192_sustained_1000W")
        found = held / peak if held else found  # what its power lets a part keep up, where that was measured
        (measured if found else assumed).append(f"rate of {precision} products")
        reachable[precision] = found or 0.78
    bandwidth = row["memory_GBps"] * 1e9
    copies = table("measured")["measured"]["memory_bandwidth"]
    copy = next(
        (copies[key]["triad"] * 1e12 for key in (name, *SAME_MEMORY.get(name, ())) if key in copies), None
    )
    (measured if copy else assumed).append("memory bandwidth")
    idle = table("measured")["measured"]["idle_power"].get(name, [0.1 * row.get("tdp_W", 0)])
    memory = row.get("memory_MiB_torch") or row.get("memory_MiB_nvidia_smi", 0) * 0.994
    return Accelerator(
        name=name,
        title=row["name"],
        device="cuda",
        bf16=row["bf16_TFLOPs"] * 1e12,
        fp8=row.get("fp8_TFLOPs", 0.0) * 1e12,
        fp32=row.get("fp32_TFLOPs", 0.0) * 1e12,
        memory=memory * MIB or row["memory_GB"] * 1e9,
        memory_bandwidth=bandwidth,
        copy=copy or COPY_SHARE * bandwidth,
        reachable=reachable["bf16"],
        reachable_fp8=reachable["fp8"],
        units=row.get("sms") or row.get("compute_units") or (132 if name.startswith(("h8", "gh")) else 148),
        nvlink=(row.get("nvlink_practical_GBps_per_direction") or _link(row)) * 1e9,
        watts=row.get("tdp_W", 0.0),
        idle_watts=sum(idle) / len(idle),
        kind=row["kind"],
        source=tuple(_list(row["source"])),
        measured=tuple(measured),
        assumed=tuple(assumed),
    )


def _aliases(name: str) -> tuple[str, ...]:
    """Names of the measured tables, which know fewer parts: an H200's products are an H100's."""
    also = {"a100-sxm": ("a100-sxm-80",), "h200-sxm": ("h100-sxm",), "h800-sxm": ("h100-sxm",)}
    base = name.removesuffix("-80").removesuffix("-40")
    return (name, base, *also.get(base, ()), *(("gb200",) if name == "gb300" else ()))


def _link(row: dict[str, Any]) -> float:
    return row.get("nvlink_GBps_per_direction") or row.get("xgmi_GBps_per_direction") or 32.0


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def node_names() -> list[str]:
    return list(table("nodes")["node"])


@lru_cache(maxsize=64)
def node(name: str) -> Node:
    """A server of the catalogue.

    Raises:
        UserError: there is none of that name.
    """
    nodes = table("nodes")["node"]
    if name not in nodes:
        raise UserError.field("fleet.node", name, f"no such server; one of {', '.join(nodes)}", nodes)
    row = nodes[name]
    size = row["gpus"]
    nics = row.get("compute_nics") or size
    rating = row.get("max_power_W") or row.get("rack_power_kW", 0) * 1e3
    if not rating:  # servers whose rating nobody published draw what the same board draws elsewhere
        rating = next(
            (r["max_power_W"] for r in nodes.values() if r.get("gpu") == row["gpu"] and "max_power_W" in r),
            0.0,
        )
    return Node(
        name=name,
        accelerator=row["gpu"],
        size=size,
        nics=nics,
        nic=row.get("compute_nic_Gbps", 0) / 8 * 1e9,
        watts=rating,
        kind=row["kind"],
        source=tuple(_list(row["source"])),
    )
