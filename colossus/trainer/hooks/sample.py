"""Lets the trained model say something at the end."""

from __future__ import annotations

from typing import cast

from colossus.generation import generate
from colossus.models import Decoder
from colossus.trainer.hooks import Hook
from colossus.trainer.training import Training

LENGTH = 120  # tokens


class Sample(Hook):
    """One greedy-ish continuation of `run.prompt`, by rank 0 where it holds the whole model."""

    def on_finish(self, training: Training) -> None:
        if training.stop_reason is not None or training.world.size > 1:
            return
        prompt = training.job.run.prompt
        (text,) = generate(
            cast(Decoder, training.state.model),
            training.data.tokenizer,
            [prompt],
            max_tokens=LENGTH,
            temperature=0.7,
            top_p=0.95,
            seed=training.job.run.seed,
        )
        training.event("sample", prompt=prompt, text=text)
