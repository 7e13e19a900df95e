#!/usr/bin/env bash
# PyTorch 2.13.0 on a processor, torch.nn.functional.scaled_dot_product_attention: values that are narrower than keys
# (latent attention, as in DeepSeek-V3: keys of 192, values of 128) do not take the fused kernel, which wants one
# width. Without a word they take plain products that write the scores of all pairs of tokens, in forward and for
# backward: less to compute needs many times the memory, and grows with the square of the tokens where values of the
# keys' width grow with the tokens. A CUDA device has kernels for it; so who plans the memory of one by tensors on
# a processor, fake ones too, is told of scores that it never writes.
#
# Seen (4 heads, 2,048 and 4,096 tokens, bytes allocated at most beyond the inputs, forward and backward, by the
# profiler): values of 192: 40 and 78 MB; values of 128: 226 and 856 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
HEADS, KEYS = 4, 192


def most(tokens: int, values: int) -> int:
    """Bytes that attention has at once beside what it is given, forward and backward."""
    q, k = (torch.randn(1, HEADS, tokens, KEYS, requires_grad=True) for _ in range(2))
    v = torch.randn(1, HEADS, tokens, values, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.backward(torch.ones_like(y))
    now = high = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        high = max(high, now)
    return high


found = {values: [most(tokens, values) for tokens in (2048, 4096)] for values in (KEYS, 128)}
for values, (few, many) in found.items():
    print(f"values of {values}: {few / 1e6:.0f} MB of 2,048 tokens, {many / 1e6:.0f} MB of 4,096")
(wide, wider), (narrow, narrower) = found[KEYS], found[128]
assert 1.8 < wider / wide < 2.2 and 3.5 < narrower / narrow < 4.2
assert narrow > 3 * wide
print("as stated")
PYTHON
"$folder/env/bin/python" "$folder/main.py"
