#!/usr/bin/env bash
# PyTorch 2.13.0 (CPU): torch.nn.functional.grouped_mm does not write the rows behind the last offset.
#
# Offsets may end before the rows do: a buffer of fixed size of which the experts fill a part. What comes back
# in the other rows is neither zero nor an error but what the memory held before, in the result and in the
# gradient of the input. A sum over all rows, or a scatter back to tokens, takes it up in silence.
#
# Seen: rows 8 to 15 of the result hold the 7.0 of a tensor that had been freed; the gradient of the input holds
# 5.0 there, of another one, or numbers like -1.7e25.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
rows, group, num_in, num_out = 16, 4, 32, 32
offsets = torch.tensor([group, 2 * group], dtype=torch.int32)  # two groups of four rows; eight rows are in none


def leave(value: float, dtype: torch.dtype) -> None:
    """Memory of the result's size is used, and freed."""
    used = [torch.full((rows, num_out), value, dtype=dtype) for _ in range(200)]
    del used


for dtype in (torch.float32, torch.bfloat16):
    left, right = torch.ones(rows, num_in, dtype=dtype, requires_grad=True), torch.ones(2, num_in, num_out, dtype=dtype)
    leave(7.0, dtype)
    out = F.grouped_mm(left, right, offs=offsets)
    assert torch.equal(out[: 2 * group], torch.full_like(out[: 2 * group], num_in)), "the rows of groups are right"
    rest = out[2 * group :].detach().clone()
    grad = torch.ones_like(out)
    leave(5.0, dtype)
    out.backward(grad)
    rest_of_gradient = left.grad[2 * group :]
    print(f"{dtype}: rows in no group hold {rest.unique().tolist()[:4]}, their gradient "
          f"{rest_of_gradient.unique().tolist()[:4]}")
    assert rest.count_nonzero() > 0, "they are zero now: this no longer holds"
    assert rest_of_gradient.count_nonzero() > 0, "the gradient is zero now: this no longer holds"
print("grouped_mm leaves rows behind the last offset as the memory was")
PYTHON
