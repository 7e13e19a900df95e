"""What a training program does that no layout says: fusion, overlap, the order of ranks.

Ours is one; the others are those whose runs were published, so that predictions can be checked against
them. Everything here is what the program does by default, from its documentation or code; nothing is fitted
to a run. What is fitted is in `scalars.toml`, by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Software:
    """Habits of a training program.

    fused_attention: scores are never written (flash attention), and masked blocks are skipped.
    flash: which kernel: "hopper" uses that generation's instructions (cuDNN, FlashAttention-3), "flash2" and
        "flash1" (before July 2023, and its Triton version) those of Ampere, whatever they run on.
    elementwise: name of the scalar that says how many bytes it moves for each that `parts` counts: fused or
        compiled programs move fewer.
    eager: kernels for each row of the ledger; what the host has to start.
    joins_inputs: queries, keys and values are one product, gate and up another.
    tp_hidden: whether products overlap with tensor-parallel messages, piece by piece: all but the first of tp
        pieces hides.
    cp_hidden: of attention's seconds, how many hide the messages of keys and values.
    gradient_bytes: of an element as gradients are summed over ranks.
    sums_gradients: whether each micro-batch's gradients are added to a buffer of `gradient_bytes` by a kernel
        of its own, not by the product that makes them.
    overlaps_gradients, overlaps_weights: whether sums of gradients hide behind the backward pass, and the
        gathering of weights behind the forward pass.
    overlaps_pipeline: whether messages between stages hide behind other micro-batches.
    overlaps_experts: the share of the tokens' way to their experts and back that hides.
    keeps_gathered: what ranks of tp and cp gather in the forward pass waits for the backward pass; else it is
        gathered once more for the gradients of weights, or of keys. stops_early: recomputation ends with what
        the backward pass needs last, before a layer's last product.
    keeps_products: selective recomputation keeps what every product gave and attention's fused kernel; else
        all but attention's own products.
    sends_once: a token goes to each node of its experts once (DeepEP).
    stages: by what layers are dealt out to the stages of a pipeline: "flops", so that the dearest stage costs
        as little as can be (`perf.stages`), or their number (`planner.stages`).
    order: of the axes over ranks, the quickest-varying first.
    graphs: kernels are replayed without the host.
    measured: elementwise work, loss and update are ours, which calibrations time.
    casts_weights: each micro-batch's products read copies of fp32 weights in their own type, and gradients
        are cast back; FSDP copies them in and out of its buffers in their place.
    fp32_weights: the weights that are kept are fp32, and products read copies (FSDP); else they are of the
        products' type, and the optimizer has fp32 ones beside its moments.
    """

    name: str
    fused_attention: bool = True
    flash: Literal["hopper", "flash2", "flash1"] = "hopper"
    elementwise: Literal["fused", "eager"] = "fused"
    eager: float = 1.0
    joins_inputs: bool = True
    tp_hidden: float = 0.0
    cp_hidden: float = 0.0
    gradient_bytes: float = 4.0
    sums_gradients: bool = False
    overlaps_gradients: bool = True
    overlaps_weights: bool = True
    overlaps_pipeline: bool = True
    overlaps_experts: float = 0.0
    keeps_gathered: bool = False
    stops_early: bool = False
    keeps_products: bool = False
    sends_once: bool = False
    stages: Literal["flops", "layers"] = "layers"
    order: tuple[str, ...] = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
    graphs: bool = False
    fp32_weights: bool = False
    measured: bool = False
    casts_weights: bool = False
    dispatch: Literal["host", "eager_host"] = "host"


OURS = Software(
    "colossus",
    fp32_weights=True,
    measured=True,
    casts_weights=True,
    joins_inputs=False,
    keeps_gathered=True,
    stops_early=True,
    keeps_products=True,
    stages="flops",
    order=("tp", "cp", "pp", "dp_shard", "dp_replicate"),
)
OURS_EAGER = replace(OURS, name="colossus, not compiled", elementwise="eager", eager=3.0)
MEGATRON_2021 = Software(
    "Megatron-LM of 2021",  # softmax, bias and gelu are fused; gradients are summed after the last batch
    fused_attention=False,
    eager=3.0,
    sums_gradients=True,
    overlaps_gradients=False,
    overlaps_weights=False,
    overlaps_pipeline=False,
    dispatch="eager_host",
)
MEGATRON_DEEPSPEED = Software(
    "Megatron-DeepSpeed",
    fused_attention=False,
    eager=3.0,
    gradient_bytes=2.0,  # fp16 engine: gradients are summed as they are kept
    sums_gradients=True,
    overlaps_gradients=False,
    overlaps_weights=False,
    overlaps_pipeline=False,
    dispatch="eager_host",
)
MEGATRON_CORE = Software(
    "Megatron-Core and NeMo",  # Transformer Engine; user buffers overlap tensor-parallel messages
    tp_hidden=1.0,
    cp_hidden=0.9,
)
NEMO_2023 = replace(
    MEGATRON_CORE, name="NeMo of 2022 and 2023", fused_attention=False, tp_hidden=0.0, overlaps_weights=False
)
MEGATRON_BRIDGE = replace(MEGATRON_CORE, name="Megatron-Bridge", sends_once=True)  # DeepEP or HybridEP
DEEPSPEED_2021 = replace(MEGATRON_DEEPSPEED, name="DeepSpeed ZeRO-3 of 2021")
FSDP = Software(
    "FSDP on PyTorch", fp32_weights=True, flash="flash2", elementwise="eager", eager=2.0
)  # not compiled
# Its scripts/train/benchmarking/sweep.sh takes v0.0.4 of May 2023; FlashAttention-2 came in July.
LLM_FOUNDRY = replace(FSDP, name="MosaicML's llm-foundry", flash="flash1")
TITAN = Software(
    "torchtitan", fp32_weights=True, flash="flash2", joins_inputs=False
)  # compiled, FSDP2, PyTorch's own attention
MAXTEXT = Software("MaxText", overlaps_experts=0.0)  # XLA: fused, gathers and sums overlapped
META = Software("Meta's Llama 3 trainer", gradient_bytes=4.0, cp_hidden=0.0)  # arXiv 2407.21783 section 3.3.2
ALL = (
    OURS,
    OURS_EAGER,
    MEGATRON_2021,
    MEGATRON_DEEPSPEED,
    MEGATRON_CORE,
    FSDP,
    LLM_FOUNDRY,
    TITAN,
    META,
    DEEPSPEED_2021,
    NEMO_2023,
    MAXTEXT,
)
