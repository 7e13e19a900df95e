"""The sourced catalogue: accelerators, servers, networks, money and failures, read from `catalogue/*.toml`.

Every group there has a `kind` (datasheet, measured, reported, shipped, second-hand, projected, assumed) and
a `source`. Here are the parts that are computed with, in SI units.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from colossus.errors import UserError

MIB = 2**20
GIB = 2.0**30  # that a vendor calls a GB of memory
COPY_SHARE = 0.8  # of a datasheet's memory bandwidth, where no copy was measured: between 0.79 and 0.87
LIKE_OTHERS = (
    0.78  # of a peak that products reach, where none was measured: Hopper 0.80, Blackwell 0.73 to 0.79
)
SEEN_BY_TORCH = 0.994  # of what nvidia-smi shows: 81,082 of 81,559 MiB, 143,156 of 143,771
NEAR_MEMORY = 1.5  # times the memory up to which a part of the same name is the same


@dataclass(frozen=True)
class Accelerator:
    """One accelerator. Rates in FLOP/s, dense; bandwidths in bytes/s, one direction; memory in bytes.

    bf16, fp8, fp32: peaks (0: the part has no such units; NaN: not published). reachable: the share of the
    bf16 peak that the best of many measured shapes came to; reachable_fp8 likewise. memory: what a program
    can allocate from. copy: the memory bandwidth that a copy was measured at, reads and writes counted.
    dispatch: seconds that the host needs to start one kernel. measured, assumed: what of it is not the
    datasheet's, in words. shared_by: ranks that share it, each with an equal part of its cores.
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
        """Dense FLOP/s of a precision; of float8 that of bf16 where the part has none.

        Raises:
            UserError: it is not published.
        """
        rate = {"fp8": self.fp8 or self.bf16, "bf16": self.bf16, "fp32": self.fp32}[precision]
        if math.isnan(rate):
            raise _unknown(self.name, f"{precision}_TFLOPs")
        return rate

    def reach(self, precision: str) -> float:
        return self.reachable_fp8 if precision == "fp8" and self.fp8 else self.reachable


@dataclass(frozen=True)
class Node:
    """A server. nic: bytes/s of one compute card, one direction; 0 where nobody published it. watts: the
    rating of the whole server, likewise. assumed: what of it is another's, in words."""

    name: str
    accelerator: str
    size: int
    nics: int
    nic: float
    watts: float
    kind: str
    source: tuple[str, ...]
    assumed: tuple[str, ...] = ()


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
        UserError: there is none of that name, or the catalogue lacks what prices need of it.
    """
    rows = table("accelerators")["accelerator"]
    if name not in rows:
        names = accelerator_names()
        raise UserError.field(
            "fleet.accelerator", name, f"no such accelerator; one of {', '.join(names)}", names
        )
    return accelerator_of(name, rows[name])


def accelerator_of(name: str, row: Mapping[str, Any]) -> Accelerator:
    """An accelerator from its row of the catalogue. What is missing is an error that names it, unless the row
    itself says under `assumed` what to take, and why. Raises as `accelerator` does."""
    guessed = dict(row.get("assumed", {}))
    why = guessed.pop("why", "")
    measured: list[str] = []
    assumed = [f"{key}={value:g}: {why}" for key, value in guessed.items()]

    def needed(*keys: str) -> float:
        """The first of these that is known."""
        value = next((known[key] for known in (row, guessed) for key in keys if key in known), None)
        if value is None:
            raise _unknown(name, " or ".join(keys))
        return float(value)

    peaks = {"bf16": needed("bf16_TFLOPs")}
    peaks |= {p: row.get(f"{p}_TFLOPs", guessed.get(f"{p}_TFLOPs", math.nan)) for p in ("fp8", "fp32")}
    reachable = {}
    base = name.partition("-")[0]
    for precision in ("bf16", "fp8"):
        peak = peaks[precision] or 1.0
        best = table("measured")["measured"]["gemm_best_shape"][precision]
        found = next((best[key] / peak for key in _aliases(name) if key in best), None)
        held = table("measured")["measured"]["gemm_other"].get(f"{base}_{precision}_8192_sustained_1000W")
        found = held / peak if held else found  # what its power lets a part keep up, where that was measured
        (measured if found else assumed).append(f"rate of {precision} products, from parts like it")
        reachable[precision] = found or LIKE_OTHERS
    bandwidth = needed("memory_GBps") * 1e9
    copies = table("measured")["measured"]["memory_bandwidth"]
    copy = next(
        (copies[key]["triad"] * 1e12 for key in (name, *SAME_MEMORY.get(name, ())) if key in copies), None
    )
    (measured if copy else assumed).append("memory bandwidth, from parts like it")
    memory = row.get("memory_MiB_torch") or row.get("memory_MiB_nvidia_smi", 0) * SEEN_BY_TORCH
    return Accelerator(
        name=name,
        title=row["name"],
        device="cuda",
        bf16=peaks["bf16"] * 1e12,
        fp8=peaks["fp8"] * 1e12,
        fp32=peaks["fp32"] * 1e12,
        memory=memory * MIB or needed("memory_GB") * GIB,
        memory_bandwidth=bandwidth,
        copy=copy or COPY_SHARE * bandwidth,
        reachable=reachable["bf16"],
        reachable_fp8=reachable["fp8"],
        units=int(needed("sms", "compute_units")),
        nvlink=1e9
        * needed(
            "nvlink_practical_GBps_per_direction", "nvlink_GBps_per_direction", "xgmi_GBps_per_direction"
        ),
        watts=needed("tdp_W"),
        kind=row["kind"],
        source=tuple(_list(row["source"])),
        measured=tuple(measured),
        assumed=tuple(assumed),
    )


def _unknown(name: str, key: str) -> UserError:
    return UserError(
        f"fleet.accelerator={name}: the catalogue does not know its {key} "
        "(colossus/hardware/catalogue/accelerators.toml); colossus plan --hardware lists parts that can be "
        "planned for"
    )


def name_of_driver(title: str, memory_bytes: float) -> str | None:
    """The accelerator of the catalogue that a driver calls `title`; None where there is none."""
    words = set(re.findall(r"[a-z]+\d+[a-z]*|pcie|nvl", title.lower()))
    form = next((f for f in ("pcie", "nvl") if f in words), "")
    rows = table("accelerators")["accelerator"]

    def is_it(name: str) -> bool:
        chip, _, rest = name.partition("-")
        form_there = next((f for f in ("pcie", "nvl") if f in rest), "")
        size = memory_bytes / (rows[name]["memory_GB"] * GIB)
        return chip in words and form == form_there and 1 / NEAR_MEMORY < size < NEAR_MEMORY

    found = [name for name in accelerator_names() if is_it(name)]
    return min(found, key=lambda name: abs(rows[name]["memory_GB"] * GIB - memory_bytes), default=None)


def _aliases(name: str) -> tuple[str, ...]:
    """Names of the measured tables, which know fewer parts: an H200's products are an H100's."""
    also = {"a100-sxm": ("a100-sxm-80",), "h200-sxm": ("h100-sxm",), "h800-sxm": ("h100-sxm",)}
    base = name.removesuffix("-80").removesuffix("-40")
    return (name, base, *also.get(base, ()), *(("gb200",) if name == "gb300" else ()))


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
    if "compute_nic_Gbps" in row and "compute_nics" not in row:
        raise UserError(f"fleet.node={name}: the catalogue does not know its compute_nics")
    rating = row.get("max_power_W") or row.get("rack_power_kW", 0) * 1e3
    assumed: tuple[str, ...] = ()
    if not rating:  # servers whose rating nobody published draw what the same board draws elsewhere
        like = [n for n, r in nodes.items() if r["gpu"] == row["gpu"] and "max_power_W" in r]
        rating = nodes[like[0]]["max_power_W"] if like else 0.0
        assumed = (f"power of {name}, from {like[0]}",) if like else ()
    return Node(
        name=name,
        accelerator=row["gpu"],
        size=row["gpus"],
        nics=row.get("compute_nics", 0),
        nic=row.get("compute_nic_Gbps", 0) / 8 * 1e9,
        watts=rating,
        kind=row["kind"],
        source=tuple(_list(row["source"])),
        assumed=assumed,
    )
