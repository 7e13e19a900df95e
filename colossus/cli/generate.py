"""`colossus generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest of this total probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another text; only above temperature 0.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    from colossus import api

    model, tokenizer = api.load_model(path)
    texts = api.generate(
        model,
        tokenizer,
        [prompt],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    print(prompt + texts[0])
