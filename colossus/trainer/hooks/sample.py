"""Lets the trained model say something at the end."""

from __future__ import annotations

from typing import cast

import torch

from colossus.architecture import num_parameters
from colossus.errors import only_shown
from colossus.evaluation.bits_per_byte import Validation
from colossus.generation import generate
from colossus.generation.load import load_model
from colossus.measure.machine import free_memory_bytes
from colossus.models import Decoder
from colossus.precision import torch_type
from colossus.trainer.hooks import Hook
from colossus.trainer.training import Training
from colossus.words import size

LENGTH = 120  # tokens
COPIES = 3  # of the weights in fp32 that there must be memory for: read, cast, laid out for few rows


class Sample(Hook):
    """One greedy-ish continuation of `run.prompt`, or the answer to a held-out question where answers are
    learned and no prompt was asked for; by rank 0: of several ranks none holds the whole model, so it loads
    what was just saved."""

    def on_finish(self, training: Training) -> None:
        if training.stop_reason is not None or training.world.rank != 0:
            return
        with only_shown(f"{training.folder}: the run is finished; no sample of what it writes"):
            self._write(training)

    def _write(self, training: Training) -> None:
        model = self._whole(training)
        if model is None:
            return
        prompt, tokenizer = training.job.run.prompt, training.data.tokenizer
        question = None
        if not training.job.asked_for("run.prompt"):
            question = Validation(training.data.validation, training.job.data.seq_len).question()
        if question is not None:
            prompt = tokenizer.decode(question.tolist())
        (text,) = generate(
            model,
            tokenizer,
            [prompt if question is None else question.tolist()],
            max_tokens=LENGTH,
            temperature=0.7,
            top_p=0.95,
            seed=training.job.run.seed,
        )
        training.event("sample", prompt=prompt, text=text, is_answer=question is not None)

    def _whole(self, training: Training) -> Decoder | None:
        world = training.world
        if world.size == 1:
            return cast(Decoder, training.state.model)
        needed, free = 4 * COPIES * num_parameters(training.state.arch), _free_bytes(world.device)
        if needed > free:
            training.event(
                "note",
                text=f"no sample of what it writes: the whole model needs {size(needed)} on one rank, and "
                f"{size(free)} is free; colossus generate {training.folder} writes one",
            )
            return None
        kind = min(torch_type(training.job.precision.type), torch.float32, key=lambda dtype: dtype.itemsize)
        return load_model(training.folder, kind, world.device)[0]


def _free_bytes(device: torch.device) -> int:
    return free_memory_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
