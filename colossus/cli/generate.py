"""`colossus generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a Hugging Face folder.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="The texts to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Choose among those at least this times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what the text holds already becomes less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another text; only above temperature 0.")] = 0,
) -> None:
    """Continue texts with a trained model."""
    from colossus import api

    model, tokenizer = api.load_model(path, "quickest")
    texts = api.generate(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)
