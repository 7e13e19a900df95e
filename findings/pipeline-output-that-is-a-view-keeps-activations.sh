#!/usr/bin/env bash
# PyTorch 2.13.0, torch.distributed.pipelining: a last stage whose output is a view (a loss that was reshaped to [1], as
# schedules ask for outputs that can be concatenated) keeps the activations of *every* micro batch until the next step.
# step() collects the stage's outputs by default; after each backward pass the last stage detaches its outputs, but
# leaves out views, which cannot be detached in place, and behind these hangs the whole graph. A copy of the same
# output keeps nothing, nor does return_outputs=False. Numbers are right in each case: it is memory alone that grows
# with the number of micro batches, which pipelines exist to prevent.
#
# Seen (zero-bubble schedule, 8 micro batches; tensors that the last stage saved for its backward passes and that still
# live when step() has returned): output a copy 0 of 8; output a view 8 of 8; with return_outputs=False 0 of 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import sys
import tempfile
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")
MICRO_BATCHES, WIDTH = 8, 16


class Stage(nn.Module):
    """A product and a nonlinearity, whose result is kept for the backward pass; the last gives a loss."""

    def __init__(self, is_last: bool, is_view: bool, alive: list[weakref.ref]) -> None:
        super().__init__()
        self.linear, self.is_last, self.is_view, self.alive = nn.Linear(WIDTH, WIDTH), is_last, is_view, alive

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x).exp()
        if not self.is_last:
            return hidden
        self.alive.append(weakref.ref(hidden.untyped_storage()))
        loss = hidden.log1p().square().mean()
        return loss.reshape(1) if self.is_view else loss.reshape(1).clone()


def activations_after_a_step(is_view: bool, **how: bool) -> int:
    torch.manual_seed(0)
    alive: list[weakref.ref] = []
    stages = [
        PipelineStage(Stage(index == 1, is_view, alive), index, 2, torch.device("cpu")) for index in range(2)
    ]
    schedule = ScheduleInterleavedZeroBubble(
        stages, MICRO_BATCHES, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
    )
    rows = torch.randn(2 * MICRO_BATCHES, WIDTH)
    schedule.step(rows, target=torch.zeros(2 * MICRO_BATCHES), losses=[], **how)
    return sum(reference() is not None for reference in alive[-MICRO_BATCHES:])


with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
    found = {
        (is_view, outputs): activations_after_a_step(is_view, return_outputs=outputs)
        for is_view in (False, True)
        for outputs in (True, False)
    }
    dist.destroy_process_group()
for (is_view, outputs), number in found.items():
    print(f"output is a view: {is_view}; return_outputs: {outputs}; alive: {number} of {MICRO_BATCHES}")
assert found == {(False, True): 0, (False, False): 0, (True, True): MICRO_BATCHES, (True, False): 0}, found
sys.exit(0)
PYTHON
"$folder/env/bin/python" "$folder/main.py"
