#!/usr/bin/env bash
# PyTorch 2.13.0, torch.distributed.pipelining with torch.utils.checkpoint: under a schedule that computes the gradients
# of weights apart (zero bubble), a layer that is recomputed (checkpoint, use_reentrant=False) is not computed once more
# in a backward pass, as under 1F1B and as users plan for: it is computed once for the gradients of the inputs, and
# once more for *each group of weights*, since the pipeline calls autograd once a group and checkpoint keeps what it
# computed by graph task. All these copies live until the last of them is done. Numbers are right; a layer of many
# weights is computed many times, and what was to save memory takes more than without recomputation.
#
# Seen (one layer of 4 products, one micro batch; forward passes of the layer in one step, its own included): 1F1B 2,
# interleaved zero bubble 6 in the second of two stages; in the first, which has no gradient of inputs to compute, 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleavedZeroBubble
from torch.utils.checkpoint import checkpoint

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")
WIDTH, PRODUCTS, MICRO_BATCHES = 16, 4, 2


class Stage(nn.Module):
    """Some products with a nonlinearity after each, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(PRODUCTS)])
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False, early_stop=False)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        for linear in self.linears:
            x = linear(x).tanh()
        return x


def passes(kind: type, num_stages: int) -> list[float]:
    """Forward passes of each stage a micro batch; the step before has made what a schedule needs."""
    torch.manual_seed(0)
    stages = [PipelineStage(Stage(), index, num_stages, torch.device("cpu")) for index in range(num_stages)]
    schedule = kind(
        stages if num_stages > 1 else stages[0], MICRO_BATCHES, loss_fn=lambda y, _: y.square().mean()
    )
    rows = torch.randn(2 * MICRO_BATCHES, WIDTH)
    schedule.step(rows, target=torch.zeros(2 * MICRO_BATCHES), losses=[])
    for stage in stages:
        stage.submod.passes = 0
    schedule.step(rows, target=torch.zeros(2 * MICRO_BATCHES), losses=[])
    return [stage.submod.passes / MICRO_BATCHES for stage in stages]


dist.init_process_group(
    "gloo", rank=0, world_size=1, init_method=f"file://{Path(tempfile.mkdtemp()) / 'store'}"
)
plain, apart = passes(Schedule1F1B, 1), passes(ScheduleInterleavedZeroBubble, 2)
dist.destroy_process_group()
print(f"torch {torch.__version__}: 1F1B {plain}, interleaved zero bubble {apart}")
sys.exit(plain != [2.0] or apart != [2.0, 2.0 + PRODUCTS])
PYTHON
"$folder/env/bin/python" "$folder/main.py"
