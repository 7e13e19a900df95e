"""Memory of several ranks at the moments that may need most, by hand: 10 numbers outside layers, 4 of
them the output matrix, and 6 layers of 20, over 2 shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colossus.planner.columns import Layouts
from colossus.planner.memory import memory
from colossus.planner.moments import Held, Moment, most, most_alone
from tests.planner.problems import problem

HELD = Held(
    weights=np.array([[130.0]]), shards=np.array([[65.0]]), edges=np.array([[10.0]]), head=np.array([[4.0]]),
    embedding=np.array([[5.0]]), tied=False, recomputed=np.array([[0.0]]),
    layer=np.array([[20.0]]), optimizer=np.array([[520.0]]), activations=np.array([[1000.0]]),
    of_layer=np.array([[150.0]]), again=np.array([[0.0]]), loss=np.array([[5000.0]]), output=np.array([7.0]),
    tp=np.array([1.0]), summed=np.array([[1.0]]),
    waiting=np.array([[1.0]]), put_off=np.array([[0.0]]), in_halves=False,
    working=np.array([[100.0]]), last=np.array([[1.0]]), size=2.0,
    zero=np.array([1.0]), micro_batches=np.array([8.0]), chunks=np.array([1.0]),
    update=np.array([[0.0]]),
)  # fmt: skip
LOSS, COPIES = "loss or one layer's gradients", "copies of weights"


def by_use(moment: Moment = "any", **changed: float) -> dict[str, float]:
    return {name: float(value[0, 0]) for name, value in most(held(**changed), moment).items()}


def alone(**changed: float) -> dict[str, float]:
    return {name: float(value[0, 0]) for name, value in most_alone(held(**changed)).items()}


def held(**changed: float) -> Held:
    arrays = {name: np.full(np.shape(getattr(HELD, name)), value) for name, value in changed.items()}
    return replace(HELD, **arrays)


@pytest.mark.parametrize(
    ("zero", "gradients", "copies"),
    [
        (1, 4 * 130, 2 * 130),  # sums whole, weights whole in two bytes
        (2, 4 * 65, 2 * 130 + 4 * 10),  # sums divided; those outside layers on their way, in fp32
        (
            3,
            4 * 65,
            2 * 10 + 2 * 20 + 4 * 10,
        ),  # weights outside layers whole, and the last layer's as it came
    ],
)
def test_the_loss(zero: int, gradients: int, copies: int) -> None:
    found = by_use(zero=zero)
    assert found["weights"] == 4 * 65 and found["optimizer"] == 520 and found["activations"] == 1000
    assert found["gradients"] == gradients and found[COPIES] == copies
    assert found[LOSS] == 5000 + 4 * 4 + 7  # the output matrix's gradient in fp32, and its input's


def test_the_only_micro_batch_has_gathered_layers_and_no_sums() -> None:
    found = by_use(micro_batches=1)
    assert found["gradients"] == 0 and found[COPIES] == 2 * 130 + 2 * 20


def test_losses_that_wait_keep_their_gradients() -> None:
    found = by_use(waiting=8)
    assert found["gradients"] == 4 * 130 and found[LOSS] == 5000 + 8 * (4 * 4 + 7)


def test_what_tp_gathers_for_the_output_matrix() -> None:
    assert by_use(tp=4)[LOSS] == 5000 + 4 * 4 + 7 * (2 - 1 / 4)


@pytest.mark.parametrize(("zero", "copies"), [(1, 2 * 130), (2, 2 * 130 + 4 * 10), (3, 2 * 50 + 4 * 10)])
def test_the_first_layer_that_is_propagated_back(zero: int, copies: int) -> None:
    """Of a rank without the end: a layer made again, its gradients in two bytes, and what the micro batch
    before has summed last."""
    found = by_use(zero=zero, last=0, loss=0, again=300)
    assert found["activations"] == 1300 and found[LOSS] == 100 + 2 * 20 and found[COPIES] == copies


def test_the_second_layer_finds_sums_on_their_way() -> None:
    """And less that waits: it is the most where layers are large and leave little."""
    found = by_use(zero=2, last=0, loss=0, again=300, of_layer=30)
    assert found["activations"] == 1270 and found[COPIES] == 2 * 130 + 4 * 20
    assert found[LOSS] == 100 + 2 * 20


def test_sums_of_some_stages() -> None:
    assert by_use(summed=0.25)["gradients"] == 130
    assert by_use(summed=0.25, loss=0)["gradients"] == 130 + 4 * 20  # and those of a layer
    # At the end all, divided but for those outside layers, beside what is sent of these: 10 in each.
    found = by_use(summed=0, activations=0, loss=0, working=0, layer=0)
    assert found["gradients"] == 4 * 65 and found[COPIES] == 4 * 10 + (4 * 10 - 4 * 5)


def test_each_stage_of_a_rank_sums_for_itself() -> None:
    assert by_use(zero=2, last=0, loss=0, again=300, chunks=3)[COPIES] == 2 * 130 + 4 * (10 + 2 * 20)


def test_the_end_of_the_only_micro_batch_has_all_gradients() -> None:
    found = by_use(micro_batches=1, zero=3, activations=0, loss=0, working=0)
    assert found["gradients"] == 4 * (65 - 5) and found["activations"] == 0  # those outside layers come last
    assert found[LOSS] == 2 * 20 + 2 * 4 and found[COPIES] == 2 * 10 + 4 * 20
    found = by_use(micro_batches=1, zero=3, activations=0, loss=0, working=0, layer=0)
    assert found["gradients"] == 4 * 65 and found[LOSS] == 0 and found[COPIES] == 4 * 10
    few = by_use(micro_batches=1, zero=3, activations=0, loss=0, working=0, layer=0, shards=13)
    assert few[COPIES] == 4 * 10 + (2 * 10 - 4 * 1)  # in two bytes they are there until they are sent


def test_a_moment_of_a_schedule_is_a_loss_or_a_backward_pass() -> None:
    assert by_use("loss", loss=0)[LOSS] == 4 * 4 + 7
    assert by_use("backward")[LOSS] == 100 + 2 * 20 + 2 * 4


def test_gradients_of_weights_that_are_put_off() -> None:
    """The output matrix's, of each such micro-batch, in fp32; of the only one no sums are on their way."""
    assert by_use("backward", put_off=3)[LOSS] == 100 + 2 * 20 + 2 * 4 + 3 * (4 * 4 + 7)
    assert by_use("backward", micro_batches=1, last=0)[COPIES] == 2 * 130
    for in_halves, sums in ((False, 4 * 20), (True, 0)):
        found = by_use("backward", micro_batches=1, last=0, of_layer=0, in_halves=in_halves)
        assert found[COPIES] == 2 * 130 + sums


def test_the_loss_of_one_rank_alone() -> None:
    """Copies of all layers wait, and one of the output matrix is made; without cast there are none."""
    found = alone()
    assert found["weights"] == 4 * 130 and found["gradients"] == 4 * 130
    assert found[LOSS] == 5000 + 4 * 4 + 2 * 7 and found[COPIES] == 2 * 120 + 2 * 4
    assert alone(size=4)[COPIES] == 0
    assert alone(micro_batches=1)["gradients"] == 0
    assert alone(recomputed=0.5)[COPIES] == 2 * 60 + 2 * 4


@pytest.mark.parametrize(("micro_batches", "gradients", "one"), [(8, 4 * 130, 100), (1, 0, 100 + 4 * 4)])
def test_the_first_layer_back_of_one_rank_alone(micro_batches: int, gradients: int, one: int) -> None:
    """Made again, with a copy of its own weights; the gradient of the output matrix is there."""
    found = alone(loss=0, again=300, recomputed=1, micro_batches=micro_batches)
    assert found["activations"] == 1300 and found[COPIES] == 2 * 20
    assert found["gradients"] == gradients and found[LOSS] == one


def test_the_second_layer_back_of_one_rank_alone() -> None:
    """Which finds less that waits, and what the first has left."""
    more = {"loss": 0.0, "again": 300, "recomputed": 1, "of_layer": 30}
    found = alone(micro_batches=1, **more)
    assert found["activations"] == 1270 and found["gradients"] == 4 * 20 and found[LOSS] == 100 + 4 * 4
    assert alone(**more)[LOSS] == 100 + 4 * 20


def test_the_end_of_one_rank_alone() -> None:
    """A gradient of the embedding beside the sum that it is added to; where the output matrix is the same,
    both and their sum."""
    none = {"activations": 0.0, "loss": 0, "working": 0, "output": 0, "layer": 0, "size": 4.0}
    assert alone(**none)[LOSS] == 4 * 5 and alone(**none)["gradients"] == 4 * 130
    once = {name: value for name, value in none.items() if name != "size"} | {"micro_batches": 1.0}
    assert alone(**once)[LOSS] == 0
    assert alone(**once, tied=True)[LOSS] == 4 * 5 + 4 * 4


def test_buckets_of_the_update_come_when_activations_are_gone() -> None:
    found = by_use(update=9000)
    assert found["optimizer"] == 520 + 9000 and found["gradients"] == 4 * 65
    assert found["activations"] == found[LOSS] == found[COPIES] == 0


def test_muon_needs_room_for_whole_matrices() -> None:
    """Of 405B a rank of 1024 has little, but an owner a matrix of 16,384 x 53,248 in fp32, and more."""
    layouts = Layouts.of([{"dp_shard": 128, "tp": 8, "zero": 3, "recompute": 2}])
    muon, adamw = (
        memory(replace(problem("llama3.1-405b", count=1024, seq_len=64), optimizer=name), layouts)
        for name in ("muon", "adamw")
    )
    assert muon.parts["optimizer"] > 10 * 16384 * 53248 > 2 * adamw.parts["optimizer"]
