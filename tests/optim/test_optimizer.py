"""Our optimizers against PyTorch's plain AdamW, by their groups and their state, alone and on two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from colossus import optim
from colossus.architecture import Architecture, Experts
from colossus.layout import Layout
from colossus.models import Decoder, build, initialise
from colossus.optim.muon import Muon
from colossus.optim.optimizer import Optimizer
from colossus.parallel.data import shard
from colossus.parallel.grad_norm import clip
from colossus.parallel.recompute import recompute_layers
from colossus.parallel.world import World
from colossus.sections import Optimizer as Settings
from tests.models.reference import architecture, random_tokens
from tests.parallel.real_ranks import in_ranks

MATRICES = (
    "wq.weight",
    "wk.weight",
    "wv.weight",
    "wo.weight",
    "w_gate.weight",
    "w_up.weight",
    "w_down.weight",
)
VALUES = {
    "lr": 0.01,
    "matrix_lr": 0.03,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-6,
    "momentum": 0.9,
}
FACTORS = (0.25, 0.5, 1.0, 0.7)


def arch(**changed: object) -> Architecture:
    return architecture(qk_norm=True, **changed)


def made(name: str, dtype: torch.dtype = torch.float64, **changed: object) -> tuple[Decoder, Optimizer]:
    model = build(arch(**changed), seed=1, dtype=dtype)
    return model, optim.build(model, model.arch, Settings(name=name, **VALUES), dtype)


def is_matrix(name: str) -> bool:
    return name.endswith(MATRICES)


def put_gradients(model: Decoder, step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.grad = (scale * values).to(parameter.dtype)


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_adamw_is_pytorchs_in_plain_form() -> None:
    model, ours = made("adamw")
    twin = build(arch(), seed=1, dtype=torch.float64)
    groups = [
        {"params": [p], "weight_decay": VALUES["weight_decay"] if is_matrix(name) else 0.0}
        for name, p in twin.named_parameters()
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)
    for step, factor in enumerate(FACTORS):
        put_gradients(model, step)
        put_gradients(twin, step)
        for group in theirs.param_groups:
            group["lr"] = VALUES["lr"] * factor
        ours.step(factor)
        theirs.step()
        for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14, msg=name)
    state = ours.state()
    for name, other in twin.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name, kind], theirs.state[other][kind], rtol=1e-12, atol=1e-14)


def test_without_a_gradient_only_weight_decay_is_left() -> None:
    """On the layers' matrices, at their own rate; embedding, head and norms keep every bit."""
    for name, rate in (("adamw", VALUES["lr"]), ("muon", VALUES["matrix_lr"])):
        model, optimizer = made(name)
        before = weights(model)
        put_gradients(model, 0, scale=0.0)
        optimizer.step(0.5)
        for parameter, after in weights(model).items():
            kept = 1 - 0.5 * rate * VALUES["weight_decay"] if is_matrix(parameter) else 1.0
            expected = before[parameter] * kept
            torch.testing.assert_close(after, expected, rtol=1e-15 if kept < 1 else 0, atol=0, msg=parameter)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_the_state_of_its_optimizer(name: str, tied: bool) -> None:
    """Made at once, and named alike when layers are wrapped; Muon has the layers' matrices alone."""
    model, optimizer = made(name, tie_embeddings=tied)
    expected = set()
    for parameter in weights(model):
        kinds = ["momentum"] if name == "muon" and is_matrix(parameter) else ["exp_avg", "exp_avg_sq"]
        expected |= {(parameter, kind) for kind in kinds}
    state = optimizer.state()
    assert state.keys() == expected
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    for (parameter, _), tensor in state.items():
        assert tensor.shape == model.get_parameter(parameter).shape and not tensor.any()
    assert any(p == "head.weight" for p, _ in state) is not tied
    recompute_layers(model)
    wrapped = optim.build(model, model.arch, Settings(name=name, **VALUES), torch.float64)
    assert wrapped.state().keys() == expected


def test_muon_and_adamw_move_what_is_theirs() -> None:
    """Not the matrices: bitwise AdamW's. The matrices: by matrix_lr, along an orthogonal direction."""
    (model, muon), (twin, adamw) = made("muon"), made("adamw")
    start = weights(model)
    put_gradients(model, 0)
    put_gradients(twin, 0)
    muon.step(1.0)
    adamw.step(1.0)
    for name, after in weights(model).items():
        if not is_matrix(name):
            assert torch.equal(after, weights(twin)[name]), name
            continue
        shrunk = start[name] * (1 - VALUES["matrix_lr"] * VALUES["weight_decay"])
        size = VALUES["matrix_lr"] * 0.2 * max(after.shape) ** 0.5
        direction, gradient = (shrunk - after) / size, model.get_parameter(name).grad
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        likeness = float((direction * (left @ right)).sum()) / min(after.shape)
        assert 0.7 < likeness < 1.2, name  # the range of most singular values (Jordan et al.)
        assert direction.norm() < 1.2 * min(after.shape) ** 0.5, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_that_is_loaded_before_the_first_step_goes_on_bitwise(name: str) -> None:
    model, optimizer = made(name, torch.float32)
    for step, factor in enumerate(FACTORS[:3]):
        put_gradients(model, step)
        optimizer.step(factor)
    assert optimizer.num_steps == 3

    def gone_on(num_steps: int) -> dict[str, torch.Tensor]:
        loaded, other = made(name, torch.float32)
        loaded.load_state_dict(model.state_dict())
        for key, tensor in other.state().items():
            tensor.copy_(optimizer.state()[key])
        other.num_steps = num_steps
        assert other.num_steps == num_steps
        put_gradients(loaded, 3)
        other.step(FACTORS[3])
        assert other.num_steps == num_steps + 1
        return weights(loaded)

    as_saved, as_new = gone_on(3), gone_on(0)
    put_gradients(model, 3)
    optimizer.step(FACTORS[3])
    for parameter, expected in weights(model).items():
        assert torch.equal(as_saved[parameter], expected), parameter
    assert not torch.equal(as_new["norm.weight"], model.norm.weight)  # AdamW corrects by the steps taken


def test_experts_are_matrices_and_routers_decay_with_adamw() -> None:
    """A stack under Muon is its matrices one by one; its router stays with AdamW, and is decayed."""
    experts = Experts(num_experts=3, intermediate_size=20, router_bias=True, bias=True)
    models = [made(name, experts=experts) for name in ("adamw", "muon")]
    for model, optimizer in models:
        put_gradients(model, 0)
        start = weights(model)
        optimizer.step(1.0)
        moe, muon = "layers.0.moe", optimizer is models[1][1]
        kinds = {kind for name, kind in optimizer.state() if name == f"{moe}.experts.w_gate"}
        assert kinds == ({"momentum"} if muon else {"exp_avg", "exp_avg_sq"})
        for name in (f"{moe}.experts.w_gate", f"{moe}.experts.w_down"):
            stack = start[name]
            if muon:
                singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack]
                alone = Muon(singles, VALUES["matrix_lr"], VALUES["momentum"], 0.2, torch.float64)
                for single, gradient in zip(singles, model.get_parameter(name).grad, strict=True):
                    single.grad = gradient
                alone.step(1.0)
                expected = torch.stack([single.detach() for single in singles])
                torch.testing.assert_close(weights(model)[name], expected, rtol=1e-12, atol=1e-14)
        for name, rate in ((f"{moe}.router.weight", 0.2), (f"{moe}.router.bias", 0.0)):
            moved = weights(model)[name] - start[name] * (1 - VALUES["lr"] * rate)
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, VALUES["lr"]), rtol=1e-4, atol=0)
    expected = {"layers.0.moe.router.bias", "layers.0.moe.experts.w_up_bias"}
    assert all((name, "exp_avg") in models[1][1].state() for name in expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_forgotten(name: str) -> None:
    model, optimizer = made(name)
    put_gradients(model, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


UNEVEN = {"intermediate_size": 51, "num_heads": 3, "num_kv_heads": 3, "hidden_size": 17}
ROWS, STEPS = 4, 2


def trained(world: World) -> dict[str, np.ndarray]:
    """Weights and state, whole, after steps of Muon in float64, each on this rank's rows of a batch."""
    with torch.device("meta"):
        model = Decoder(arch(**UNEVEN)).double()
    model.compute_dtype = torch.float64
    if world.meshes is not None:
        shard(model, world, torch.float32)  # casts nothing
    model.to_empty(device="cpu")
    initialise(model, model.arch, seed=1)
    optimizer = optim.build(model, model.arch, Settings(name="muon", **VALUES), torch.float64)
    for step in range(STEPS):
        tokens_BT = random_tokens(model.arch, ROWS, 8, seed=step).chunk(world.size)[world.rank]
        loss, _ = model(tokens_BT, tokens_BT.roll(-1, dims=1))
        (loss / (ROWS * 8)).backward()
        assert clip(model.parameters(), 0.1) > 0.1  # so that clipping is tried
        optimizer.step(FACTORS[step])
        optimizer.zero_grad()
    state = {f"{name}, {kind}": tensor for (name, kind), tensor in optimizer.state().items()}
    return {key: whole(tensor) for key, tensor in (state | dict(model.named_parameters())).items()}


def whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy()


def trained_in_a_rank(layout: dict[str, int]) -> dict[str, np.ndarray]:
    with World.join(Layout(**layout), "cpu") as world:
        return trained(world)


@pytest.mark.parametrize(
    "layout", [{"dp_replicate": 1, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1}], ids=["FSDP", "copies"]
)
def test_muon_and_adamw_on_two_ranks_equal_one(layout: dict[str, int]) -> None:
    """In float64 and to 1e-9, with matrices whose rows do not divide."""
    expected = trained(World(0, 1, torch.device("cpu")))
    for answer in in_ranks(2, trained_in_a_rank, layout):
        assert answer.keys() == expected.keys()
        for key, tensor in expected.items():
            assert np.linalg.norm(answer[key] - tensor) <= 1e-9 * np.linalg.norm(tensor), key
