#!/usr/bin/env bash
# PyTorch 2.13.0, fully_shard (FSDP2) with MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32), gradients
# accumulated over micro batches by set_requires_gradient_sync(False): a parameter that gets its first gradient in
# the *last* micro batch, beside one that had some before, ends the step with an AssertionError. The sums of the
# former micro batches wait in fp32, as the policy asks, while a first gradient goes to the reduce-scatter in the
# type of products; no cast is made for that one, though each case alone (both sooner, or both in the last) works.
# Who has experts that a micro batch did not visit, heads that join late, or a pipeline that computes gradients of
# weights apart meets it.
#
# Seen, for (micro batches that use the second of two weights, of two): both, or none but the last for both weights:
# a step; the last alone: "FSDP reduce-scatter expects uniform gradient dtype but got {torch.bfloat16,
# torch.float32}".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        y = self.first(x)
        return y + self.second(x) if both else y


def step(uses: list[bool]) -> str:
    """What becomes of a step whose micro batches use the second weight, or not."""
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(Two(), mp_policy=policy)
    try:
        for number, both in enumerate(uses):
            model.set_requires_gradient_sync(number == len(uses) - 1)
            model(torch.ones(4, 8), both).float().square().mean().backward()
    except AssertionError as error:
        return str(error)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    return "a step"


with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=0, world_size=1)
    found = {str(uses): step(uses) for uses in ([True, True], [True], [False, True])}
    dist.destroy_process_group()
for uses, said in found.items():
    print(uses, "->", said)
assert found["[True, True]"] == found["[True]"] == "a step"
assert "uniform gradient dtype" in found["[False, True]"] and "float32" in found["[False, True]"]
print("as stated")
PYTHON
"$folder/env/bin/python" "$folder/main.py"
