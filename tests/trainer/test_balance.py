"""What keeps experts' loads alike follows the global batch: however it is cut up, and on real ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from colossus import optim
from colossus.architecture import Experts
from colossus.data.loader import Batch
from colossus.generation.load import load_model
from colossus.job import Job
from colossus.layout import Layout
from colossus.models import Decoder, initialise
from colossus.models.experts import MoE
from colossus.parallel.data import shard
from colossus.parallel.recompute import recompute_layers
from colossus.parallel.world import World
from colossus.trainer.balance import Balance, ExpertLoads
from colossus.trainer.state import TrainState
from colossus.trainer.step import StepResult, train_step
from tests.models.reference import architecture
from tests.parallel.real_ranks import in_ranks
from tests.trainer.running import Kill, assert_bitwise_equal, run_of, train_in_processes

ROWS, STEPS = 8, 3
METHODS: dict[str, dict[str, Any]] = {
    "none": {"balance_loss": 0.0},
    "batch": {"balance_loss": 0.5, "z_loss": 0.01},
    "sequence": {"balance_loss": 0.5, "balance_over": "sequence"},
    "bias": {"balance_loss": 0.0, "selection_bias": True, "bias_rate": 0.03, "scores": "sigmoid"},
}
Results = dict[str, np.ndarray]


def job_of(method: str, micro_batch: int, optimizer: str = "muon") -> Job:
    """Five experts, which two ranks do not share evenly; one layer of two has them."""
    experts = Experts(num_experts=5, per_token=2, intermediate_size=24, num_shared=1, **METHODS[method])
    model = architecture(experts=experts.model_copy(update={"dense_layers": 1}), num_layers=3)
    values = {f"model.{name}": value for name, value in model.model_dump(exclude_none=True).items()} | {
        "optimizer.name": optimizer,
        "optimizer.lr": 0.01,
        "optimizer.matrix_lr": 0.02,
        "optimizer.weight_decay": 0.1,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.momentum": 0.9,
        "optimizer.grad_clip": 1.0,
        "optimizer.z_loss": 0.0,
        "layout.micro_batch": micro_batch,
        "layout.zero": 3,
    }
    return Job().put(values, "argument")


def exact_state(job: Job, world: World, recompute: bool = False) -> TrainState:
    """As `TrainState.build` makes it, in float64."""
    with torch.device("meta"):
        model = Decoder(job.model).double()
    model.compute_dtype = torch.float64
    if recompute:
        recompute_layers(model)
    if world.meshes is not None:
        shard(model, world, torch.float32)  # casts nothing
    model.to_empty(device="cpu")
    initialise(model, job.model, seed=1)
    return TrainState(job.model, model, optim.build(model, job.model, job.optimizer, torch.float64))


def batch_of(step: int, world: World, padding: int = 0) -> Batch:
    """This rank's rows of a global batch; the last rows of all may be padding, with tokens in it."""
    draw = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(61, (ROWS, 12), generator=draw)
    targets_BT = torch.randint(61, (ROWS, 12), generator=draw)
    if padding:
        tokens_BT = torch.cat((tokens_BT, torch.full((padding, 12), 7)))
        targets_BT = torch.cat((targets_BT, torch.full((padding, 12), -100)))
    tokens_BT, targets_BT = (t.chunk(world.size)[world.rank] for t in (tokens_BT, targets_BT))
    return Batch(step, 0, tokens_BT, targets_BT, None, int((targets_BT != -100).sum()), ROWS * 12)


def stepped(
    method: str, micro_batch: int, world: World, recompute: bool = False, padding: int = 0
) -> tuple[Results, StepResult]:
    """Gradients of the last of three steps, then all weights, state and buffers, whole."""
    job = job_of(method, micro_batch)
    state = exact_state(job, world, recompute)
    found: Results = {}
    update = state.optimizer.step

    def kept(lr_factor: float, taken: torch.Tensor) -> None:
        for name, parameter in state.model.named_parameters():
            found[f"{name}, gradient"] = whole(parameter.grad)
        update(lr_factor, taken)

    state.optimizer.step = kept  # type: ignore[method-assign]
    for step in range(STEPS):
        result = train_step(state, batch_of(step, world, padding), ROWS * 12, 1.0, job, world)
    found |= {", ".join(key): whole(tensor) for key, tensor in state.tensors().items()}
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}, result


def whole(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy().copy()


def assert_same(ours: Results, theirs: Results, tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        scale = np.linalg.norm(theirs[key])
        assert np.linalg.norm(tensor - theirs[key]) <= tolerance * scale + 1e-15, key
        if key.endswith("buffer"):
            assert np.array_equal(tensor, theirs[key]), key


ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_how_a_batch_is_cut_changes_nothing(method: str) -> None:
    """1 x 8, 2 x 4 and 8 x 1; with padding; and recomputed, which counts no visit twice."""
    expected, result = stepped(method, 8, ALONE)
    assert result.experts is not None and result.experts.expert_load > 1
    assert ("layers.1.moe.router.selection_bias, buffer" in expected) == (method == "bias")
    assert ("layers.1.moe.router.shares, buffer" in expected) == (method == "batch")
    for micro_batch, recompute, padding in ((4, False, 0), (1, False, 0), (4, True, 0), (3, False, 1)):
        found, other = stepped(method, micro_batch, ALONE, recompute, padding)
        assert_same(found, expected, 1e-11)
        assert other.experts is not None
        assert other.experts.expert_load == result.experts.expert_load
        assert other.experts.router_entropy == pytest.approx(result.experts.router_entropy, rel=1e-12)


def in_a_rank(
    layout: dict[str, int], recompute: bool, methods: list[str]
) -> dict[str, tuple[Results, ExpertLoads | None]]:
    found = {}
    with World.join(Layout.model_validate(layout), "cpu") as world:
        for method in methods:
            results, step = stepped(method, 2, world, recompute)
            found[method] = results, step.experts
    return found


@pytest.mark.parametrize(
    ("layout", "recompute", "methods"),
    [
        ({"dp_replicate": 1, "dp_shard": 2}, True, list(METHODS)),
        ({"dp_replicate": 2, "dp_shard": 1}, False, ["batch"]),
    ],
    ids=["FSDP, recomputed", "copies"],
)
def test_two_ranks_equal_one(layout: dict[str, int], recompute: bool, methods: list[str]) -> None:
    axes = {"tp": 1, "pp": 1, "cp": 1, "ep": 1}
    answers = in_ranks(2, in_a_rank, layout | axes, recompute, methods)
    for method in methods:
        expected, result = stepped(method, 8, ALONE)
        for answer in answers:
            found, loads = answer[method]
            assert_same(found, expected, 1e-9)
            assert loads is not None and result.experts is not None
            assert loads.expert_load == result.experts.expert_load


def routers(state: TrainState) -> list[torch.nn.Module]:
    return [module.router for module in state.model.modules() if isinstance(module, MoE)]


def test_buffers_follow_the_visits() -> None:
    """Written out: bias += rate x sign(mean - visits); shares are of all visits; nothing where not moved."""
    job = job_of("bias", 8)
    state = exact_state(job, ALONE)
    visits = [[10.0, 20.0, 30.0, 40.0, 0.0], [20.0, 20.0, 20.0, 20.0, 20.0]]
    entropies = [50 * math.log(5), 25 * math.log(5)]
    terms = [[0.25, 0.5], [0.0, 1.0]]
    rows = [[*row, e, *t] for row, e, t in zip(visits, entropies, terms, strict=True)]
    loads = torch.tensor(rows, dtype=torch.float64).flatten()
    state.balance.update(loads, move=True)
    said = state.balance.told(loads.tolist())
    assert said is not None
    assert (said.expert_load, said.expert_load_mean, said.dropped_visits) == (2.0, 1.5, 0)
    assert said.router_entropy == pytest.approx(0.75)  # of 50 tokens' two visits
    assert (said.balance_loss, said.router_z_loss) == (0.25, 1.5)
    biases = [router.selection_bias.tolist() for router in routers(state)]  # type: ignore[union-attr]
    assert biases == [pytest.approx([0.03, 0, -0.03, -0.03, 0.03]), [0.0] * 5]
    state.balance.update(loads, move=False)
    assert biases == [router.selection_bias.tolist() for router in routers(state)]  # type: ignore[union-attr]
    state = exact_state(job_of("batch", 8), ALONE)
    assert not any(router.shares.any() for router in routers(state))  # type: ignore[operator, union-attr]
    state.balance.update(loads, move=True)
    shares = [router.shares.tolist() for router in routers(state)]  # type: ignore[union-attr]
    assert shares == [pytest.approx([0.1, 0.2, 0.3, 0.4, 0]), pytest.approx([0.2] * 5)]


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    balance = Balance(Decoder(architecture()))
    assert balance.take().tolist() == [] and balance.told([]) is None


@pytest.mark.parametrize("method", ["batch", "bias"])
def test_a_skipped_step_moves_nothing(method: str) -> None:
    job = job_of(method, 4)
    state = exact_state(job, ALONE)
    train_step(state, batch_of(0, ALONE), ROWS * 12, 1.0, job, ALONE)
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    handle = state.model.norm.weight.register_hook(lambda grad: grad * math.nan)  # type: ignore[union-attr]
    assert train_step(state, batch_of(1, ALONE), ROWS * 12, 1.0, job, ALONE).skipped
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())
    handle.remove()
    train_step(state, batch_of(2, ALONE), ROWS * 12, 1.0, job, ALONE)
    moved = [key for key, tensor in state.tensors().items() if not torch.equal(tensor, before[key])]
    assert len(moved) == len(before)


def test_a_run_with_experts_is_saved_resumed_and_loaded(small_job: Callable[..., Job]) -> None:
    """Bitwise what one that never stopped reaches; the selection bias is there when it is loaded."""
    settings = [
        "model.experts.num_experts=4",
        "model.experts.selection_bias=true",
        "model.experts.bias_rate=0.01",
        "layout.dp_shard=2",
    ]
    job, other = small_job("whole", *settings), small_job("killed", *settings)
    assert train_in_processes(job) == [0, 0]
    assert -9 in train_in_processes(other, [Kill("before", 6)])
    assert train_in_processes(other) == [0, 0]
    assert_bitwise_equal(job, other)
    for event in run_of(job).events("step"):
        assert 1 <= event["expert_load_mean"] <= event["expert_load"] <= 4 and event["dropped_visits"] == 0
        assert 0 < event["router_entropy"] <= 1
    model, _ = load_model(job.run.folder, dtype=torch.bfloat16)
    bias_X = model.layers[0].moe.router.selection_bias  # type: ignore[union-attr]
    assert bias_X.dtype == torch.float32 and bias_X.abs().max() >= 0.009
    assert model.layers[0].moe.router.shares.sum() == pytest.approx(1)  # type: ignore[union-attr]
