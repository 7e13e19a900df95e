"""The fleet of a job as hardware: its pools, its network, what it costs and how often it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from colossus.errors import UserError
from colossus.hardware.catalogue import (
    Accelerator,
    Node,
    accelerator,
    name_of_driver,
    node,
    node_names,
    table,
)
from colossus.hardware.machine import Machine
from colossus.job import preset_facts
from colossus.sections import Fleet

DAY = 86400.0
NODE_SIZE = 8  # devices that are linked as ranks of tp must be
ONE_SERVER = 8  # accelerators of a fleet that does not say how many
NIC = 50e9  # bytes/s: 400 Gb/s, what every H100 and H200 server of the catalogue has for each GPU
RESTART_MINUTES = 10.0  # detection, replacement, start and load; published runs lie between 3 and 15
SAVE_SECONDS = 2.0  # that an asynchronous checkpoint stops training
REPAIR_HOURS = 24.0
SERVER = 8  # accelerators of those servers whose failures were published
FAILURES = (
    2.3,
    10.0,
)  # per 1000 days of such a server: RSC-2 and FT-HSDP's servers; runs of order 100,000 GPUs
POWER_SHARE = 0.76  # of a server's rating that a compute-bound step draws: arXiv 2506.14551


@dataclass(frozen=True)
class Pool:
    """Accelerators of one kind."""

    accelerator: Accelerator
    count: int


@dataclass(frozen=True)
class Hardware:
    """A fleet that can be priced. nic: bytes/s of each accelerator's share of its server's cards.

    pod: accelerators that reach each other at full rate; beyond it the network is `oversubscription` times
    slower. failures: unexpected interruptions per 1000 days of a server of 8 accelerators, low and high.
    assumptions: what nobody published, in words.
    """

    name: str
    pools: tuple[Pool, ...]
    node_size: int
    nic: float
    pod: int
    oversubscription: float
    failures: tuple[float, float]
    restart_seconds: float
    save_seconds: float
    repair_seconds: float
    watts: float
    usd_per_hour: float
    usd_per_kwh: float
    pue: float
    assumptions: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return sum(pool.count for pool in self.pools)

    @property
    def accelerator(self) -> Accelerator:
        """That of the largest pool."""
        return max(self.pools, key=lambda pool: pool.count).accelerator

    @property
    def server(self) -> int:
        """Accelerators that fail and are repaired together: a node's, of a larger one 8."""
        return min(self.node_size, SERVER)

    def failing(self, accelerators: float, rate: float) -> float:
        """Failures a second of so many, in whole servers, at `rate` per 1000 days of 8 accelerators."""
        servers = math.ceil(accelerators / self.server)
        return servers * self.server / SERVER * rate / 1000 / DAY

    def with_count(self, count: int) -> Hardware:
        """The same machines, so many of them, in the same proportion where there are several kinds."""
        if len(self.pools) == 1:
            return replace(self, pools=(replace(self.pools[0], count=count),))
        kept = [round(pool.count * count / self.count) for pool in self.pools]
        kept[0] += count - sum(kept)
        pools = tuple(replace(p, count=n) for p, n in zip(self.pools, kept, strict=True) if n > 0)
        return replace(self, pools=pools)


def hardware_of(fleet: Fleet, machine: Machine | None = None, ranks: int = 1) -> Hardware:
    """What a fleet is made of.

    machine: this one, as measured, for a fleet that names no accelerator. ranks: that share its processor,
        where it has no GPU.

    Raises:
        UserError: an unknown accelerator or server, two accounts of what there is, or none.
    """
    pools = _pools(fleet)
    if pools is None:
        if machine is None and fleet.count is not None:
            raise UserError(f"fleet.count={fleet.count}: of what? give fleet.accelerator, as in h100-sxm")
        if machine is None:
            raise UserError(
                "fleet: says no accelerators; name a preset (fleet=dgx-h100-1), or fleet.accelerator and "
                "fleet.count; this machine is known once it was measured (colossus doctor)"
            )
        return _this_machine(fleet, machine, ranks)
    facts = preset_facts("fleet", fleet.preset) if fleet.preset else {}
    assumptions: list[str] = [facts["assumed"]] if "assumed" in facts else []
    server = _server(fleet, pools[0].accelerator, assumptions)
    size = server.size if server else NODE_SIZE
    nic = server.nics * server.nic / server.size if server and server.nic else 0.0
    if not nic:
        nic = NIC
        assumptions.append("400 Gb/s of network for each accelerator")
    if fleet.pools is None and fleet.count is None:
        assumptions.append(f"fleet.count={ONE_SERVER}: one server")
    if not (server and server.watts):
        assumptions.append("power of a server's rest, from a model of an H100's")
    if fleet.oversubscription is None and "assumed" not in facts:
        assumptions.append("a network without oversubscription")
    if size != SERVER:
        assumptions.append(
            f"failures by the number of accelerators: {size} fail {size / SERVER:g} times as often as a "
            f"server of {SERVER}, whose rate was published"
        )
    guessed = {
        f"a restart takes {RESTART_MINUTES:g} min": fleet.restart_minutes,
        f"a checkpoint stops training for {SAVE_SECONDS:g} s": fleet.save_seconds,
        f"a repair takes {REPAIR_HOURS:g} h": fleet.repair_hours,
    }
    if unsaid := [words for words, value in guessed.items() if value is None]:
        assumptions.append(", ".join(unsaid))
    count = sum(pool.count for pool in pools)
    usd = fleet.usd_per_hour
    if usd is None:
        usd = sum(pool.count * _rent(pool.accelerator, assumptions) for pool in pools) / count
    energy = table("money")
    return Hardware(
        name=fleet.name or fleet.preset or pools[0].accelerator.name,
        pools=pools,
        node_size=size,
        nic=nic,
        pod=fleet.pod or count,
        oversubscription=fleet.oversubscription or 1.0,
        failures=(
            FAILURES[0] if fleet.failures_low is None else fleet.failures_low,
            FAILURES[1] if fleet.failures_high is None else fleet.failures_high,
        ),
        restart_seconds=60 * (RESTART_MINUTES if fleet.restart_minutes is None else fleet.restart_minutes),
        save_seconds=SAVE_SECONDS if fleet.save_seconds is None else fleet.save_seconds,
        repair_seconds=3600 * (REPAIR_HOURS if fleet.repair_hours is None else fleet.repair_hours),
        watts=POWER_SHARE * server.watts / server.size if server and server.watts else _watts(pools),
        usd_per_hour=usd,
        usd_per_kwh=energy["price"]["semianalysis_100k_h100"]["electricity_usd_per_kWh"]
        if fleet.usd_per_kwh is None
        else fleet.usd_per_kwh,
        pue=energy["energy"]["pue"]["semianalysis_assumed"] if fleet.pue is None else fleet.pue,
        assumptions=tuple(assumptions),
    )


def _pools(fleet: Fleet) -> tuple[Pool, ...] | None:
    if fleet.pools is not None:
        if fleet.accelerator is not None or fleet.count is not None:
            both = "fleet.accelerator" if fleet.accelerator is not None else "fleet.count"
            raise UserError(f"{both} and fleet.pools: two accounts of the same accelerators; give one")
        if not fleet.pools:
            raise UserError("fleet.pools=[]: must name at least one kind of accelerators")
        return tuple(Pool(accelerator(pool.accelerator), pool.count) for pool in fleet.pools)
    if fleet.accelerator is None:
        return None
    return (Pool(accelerator(fleet.accelerator), fleet.count or ONE_SERVER),)


def _server(fleet: Fleet, part: Accelerator, assumptions: list[str]) -> Node | None:
    name = fleet.node or next((n for n in node_names() if node(n).accelerator == part.name), None)
    if name is None:
        assumptions.append(f"servers of {NODE_SIZE} accelerators")
        return None
    if fleet.node is None:
        assumptions.append(f"servers like {name}")
    assumptions.extend(node(name).assumed)
    return node(name)


def _rent(part: Accelerator, assumptions: list[str]) -> float:
    """Dollars an hour: the middle of the newest band of its family."""
    rents = table("money")["price"]["rent_usd_per_gpu_hour"]
    family = next((name for name in ("h100", "h200", "a100") if part.name.startswith(name)), None)
    if family is None:
        assumptions.append(f"{part.name} rents for what an h200 does: no price was found")
        family = "h200"
    keys = {"h100": "2026-05_median_of_37", "h200": "2026-05_long_tail", "a100": "2026"}
    value = rents[family][keys[family]]
    return float(value) if isinstance(value, (int, float)) else sum(value) / len(value)


def _watts(pools: tuple[Pool, ...]) -> float:
    """Of an accelerator and its share of the server, where no server's rating is known."""
    outside = table("nodes")["node_power"]["modelled"]["per_gpu_outside_gpu_W"]
    return POWER_SHARE * (max(pool.accelerator.watts for pool in pools) + outside)


def _this_machine(fleet: Fleet, machine: Machine, ranks: int) -> Hardware:
    """Its GPUs, or so many of them; or so many equal shares of its processor."""
    if machine.gpus and fleet.device != "cpu":
        there = len(machine.gpus)
        part, count = _measured_gpu(machine), fleet.count or there
        if count > there:
            raise UserError(
                f"fleet.count={count}: this machine has {there} of {part.title}; at most {there}, or name "
                "the accelerators of another fleet (fleet.accelerator)"
            )
    else:
        count = fleet.count or ranks
        part = _processor(machine, count)
    return Hardware(
        name=fleet.name or "this-machine",
        pools=(Pool(part, count),),
        node_size=min(count, NODE_SIZE),
        nic=part.nvlink,
        pod=count,
        oversubscription=1.0,
        failures=(0.0, 0.0),
        restart_seconds=60.0,
        save_seconds=1.0,
        repair_seconds=0.0,
        watts=part.watts,
        usd_per_hour=fleet.usd_per_hour or 0.0,
        usd_per_kwh=fleet.usd_per_kwh or 0.0,
        pue=fleet.pue or 1.0,
    )


def _processor(machine: Machine, ranks: int) -> Accelerator:
    bf16 = machine.flops_per_second("bf16")
    fp32 = machine.flops_per_second("fp32") or machine.best.flops_per_second
    bandwidth = machine.memory_bandwidth_bytes_per_second
    return Accelerator(
        name="cpu",
        title=machine.processor,
        device="cpu",
        bf16=bf16 or fp32,
        fp8=0.0,
        fp32=fp32,
        memory=machine.memory_bytes / ranks,
        memory_bandwidth=bandwidth,
        copy=bandwidth,
        reachable=1.0,
        reachable_fp8=1.0,
        units=machine.cores,
        nvlink=bandwidth / 4,  # ranks of one processor talk through its memory: two copies there and back
        watts=0.0,
        kind="measured",
        source=("this machine",),
        measured=("rate of products", "memory bandwidth", "dispatch"),
        dispatch=machine.dispatch_seconds,
        shared_by=ranks,
    )


def _measured_gpu(machine: Machine) -> Accelerator:
    """The catalogue's part of the driver's name, with what was measured of it."""
    gpu = machine.gpus[0]
    name = name_of_driver(gpu.name, gpu.memory_bytes)
    if name is None:
        raise UserError(
            f"fleet: the catalogue does not know this machine's {gpu.name} (colossus plan --hardware); name "
            f"the accelerator that is most like it (fleet.accelerator, fleet.count={len(machine.gpus)})"
        )
    base = accelerator(name)
    return replace(
        base,
        title=gpu.name,
        memory=float(gpu.memory_bytes),
        reachable=min(1.0, gpu.bf16_flops_per_second / base.bf16),
        kind="measured",
        dispatch=machine.dispatch_seconds,
        measured=("rate of bf16 products", *base.measured),
        assumed=tuple(words for words in base.assumed if not words.startswith("rate of bf16")),
    )
