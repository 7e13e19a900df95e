#!/usr/bin/env bash
# PyTorch 2.13.0: torch.utils.flop_counter.FlopCounterMode counts 0 FLOPs for the product of a matrix with a vector
# (mv, addmv, dot, so that `x @ v` is free), for addbmm, and for a whole LSTM, while the same product through
# `F.linear(x, v[None])`, or with the vector on the left (`v @ w`), is counted. So a model's FLOPs depend on how
# its author wrote a product with one column: a value head or a gate `hidden @ weight` adds nothing.
#
# Seen: 16,384 for F.linear with one output, 0 for the same numbers by `@`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__


def counted(act) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


x, v, w = torch.randn(64, 128), torch.randn(128), torch.randn(128, 256)
assert torch.allclose(x @ v, F.linear(x, v[None])[:, 0], atol=1e-4), "the same numbers"
found = {
    "F.linear(x, v[None])": counted(lambda: F.linear(x, v[None])),
    "v @ w": counted(lambda: v @ w),
    "x @ v": counted(lambda: x @ v),
    "addmv": counted(lambda: torch.addmv(torch.zeros(64), x, v)),
    "v @ v": counted(lambda: v @ v),
    "addbmm": counted(lambda: torch.addbmm(torch.zeros(64, 256), x.expand(2, 64, 128), w.expand(2, 128, 256))),
    "baddbmm": counted(
        lambda: torch.baddbmm(torch.zeros(2, 64, 256), x.expand(2, 64, 128), w.expand(2, 128, 256))
    ),
    "LSTM": counted(lambda: torch.nn.LSTM(8, 16)(torch.randn(5, 2, 8))),
}
for name, flops in found.items():
    print(f"{name}: {flops:,}")
assert found["F.linear(x, v[None])"] == 2 * 64 * 128
assert found["v @ w"] == 2 * 128 * 256
assert found["baddbmm"] == 2 * 2 * 64 * 128 * 256
for name in ("x @ v", "addmv", "v @ v", "addbmm", "LSTM"):
    assert found[name] == 0, f"{name} is counted now: this no longer holds"
print("products with a vector, addbmm and LSTM are not counted")
PYTHON
