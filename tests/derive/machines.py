"""Machines that are not this one."""

from __future__ import annotations

from colossus.hardware.machine import Machine, Rate


def machine(
    fp32: float = 100e9, bf16: float = 400e9, *, cores: int = 2, compiler: str | None = "g++"
) -> Machine:
    """Two types at these rates on one thread; as many times that on all cores."""
    rates = tuple(
        Rate(kind, threads, threads * rate)
        for kind, rate in (("fp32", fp32), ("bf16", bf16))
        for threads in (1, cores)
    )
    return Machine(
        processor="Made Up 9000",
        cores=cores,
        rates=rates,
        memory_bandwidth_bytes_per_second=20e9,
        memory_bytes=16 * 2**30,
        dispatch_seconds=2e-6,
        compiler=compiler,
    )
