"""Initial values: a function of seed, name and element alone, whatever part of a tensor a rank holds."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.architecture import parameter_table
from colossus.job import load_job
from colossus.models import Decoder, build
from colossus.models.init import fill_normal, initialise_parameter, normal, stream_keys
from tests.models.reference import architecture
from tests.parallel.real_ranks import in_ranks

MASK = 2**64 - 1


def reference(index: int, keys: tuple[int, int]) -> float:
    """The same value by Python's own integers and floats."""
    z = (index * 0x9E3779B97F4A7C15 + keys[0]) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 + keys[1]) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    radius = math.sqrt(-2 * math.log(((z >> 32) + 0.5) / 2**32))
    return radius * math.cos(2 * math.pi * (z & 0xFFFFFFFF) / 2**32)


@given(st.integers(0, 2**48), st.integers(0, 2**62), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_value_is_what_the_formula_says(index: int, seed: int, name: str) -> None:
    keys = stream_keys(seed, name)
    found = float(normal(torch.tensor([index]), keys))
    assert found == pytest.approx(reference(index, keys), abs=1e-12)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_block_holds_what_the_whole_has_there(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    end = [data.draw(st.integers(b + 1, n)) for b, n in zip(begin, shape, strict=True)]
    keys = stream_keys(3, "w")
    whole, block = torch.empty(shape), torch.empty([e - b for b, e in zip(begin, end, strict=True)])
    fill_normal(whole, shape, [0] * len(shape), 0.5, keys)
    fill_normal(block, shape, begin, 0.5, keys)
    assert torch.equal(block, whole[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))])


def test_values_are_normal_and_streams_are_independent() -> None:
    values = {name: normal(torch.arange(200_000), stream_keys(0, name)).numpy() for name in ("a", "b")}
    for sample in values.values():
        assert abs(sample.mean()) < 0.01 and abs(sample.std() - 1) < 0.01
        assert abs((sample**4).mean() - 3) < 0.1
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(values["a"], values["b"])[0, 1]) < 0.01


def test_a_model_is_filled_as_the_table_says() -> None:
    arch = architecture()
    first, again, other = build(arch, seed=1), build(arch, seed=1), build(arch, seed=2)
    table = {parameter.name: parameter for parameter in parameter_table(arch)}
    for name, tensor in first.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name))
        if table[name].init == "ones":
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert not torch.equal(tensor, other.get_parameter(name))
            assert float(tensor.detach().std()) == pytest.approx(table[name].std, rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_makes_the_same_values() -> None:
    keys = stream_keys(0, "w")
    on_cpu, on_gpu = torch.empty(300, 70), torch.empty(300, 70, device="cuda")
    for tensor in (on_cpu, on_gpu):
        fill_normal(tensor, (300, 70), (0, 0), 1.0, keys)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-6)


def part_of_405b(layers: int, data: int, tensor: int) -> tuple[float, int]:
    """Seconds that one rank takes to build Llama 3.1 405B and fill its part, and the elements of that.

    It has so many layers; their matrices are cut over `data` ranks along one axis, over `tensor` ranks along
    the other. A process group that sends nothing stands for the others.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=4567, world_size=data * tensor, store=FakeStore())
    mesh = init_device_mesh("cpu", (data, tensor))
    arch = load_job(None, ["model=llama3.1-405b", "model.initializer_range=0.02"]).model
    begin, filled = time.perf_counter(), 0
    with torch.device("meta"):
        Decoder(arch)
    for parameter in parameter_table(arch):
        if parameter.layer is not None and parameter.layer >= layers:
            continue
        placements = [Shard(0), Shard(1) if len(parameter.shape) > 1 else Replicate()]
        shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        whole, stride = (
            torch.Size(parameter.shape),
            (math.prod(parameter.shape[1:]), 1)[-len(parameter.shape) :],
        )
        local = torch.empty(shape)
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)
        initialise_parameter(sharded, parameter, seed=0)
        filled += local.numel()
    return time.perf_counter() - begin, filled


def test_one_rank_of_131072_fills_its_part_of_405b_in_seconds() -> None:
    ((seconds, filled),) = in_ranks(1, part_of_405b, 126 // 16, 1024, 8)
    assert filled > 405e9 / 131_072 / 2
    assert seconds < 10
