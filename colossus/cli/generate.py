"""`colossus generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from colossus.cli.talk import talk
from colossus.errors import UserError

ESCAPES = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}


def generate(
    path: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a Hugging Face folder.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT...]", help="The texts to continue; with --chat, to answer."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer in the model's chat template; without a prompt, line by line."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What a chat begins with, as the system's word.")
    ] = None,
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
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text (\\n: a line's end, \\t: a tab); may be given again."),
    ] = None,
    special: Annotated[
        bool, typer.Option(help="Read special tokens that a text spells as such, not in letters.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Another seed, another text; only above temperature 0.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where it computes; a GPU where there is one.")
    ] = "quickest",
) -> None:
    """Continue texts with a trained model, or talk with it (--chat)."""
    from colossus import api

    _check(bool(prompts), chat, system, special)
    model, tokenizer = api.load_model(path, "quickest", device)
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": [_unescaped(text) for text in stop or ()],
        "seed": seed,
    }
    begin = [] if system is None else [{"role": "system", "content": system}]
    if not prompts:
        talk(model, api.there(tokenizer), begin, **sampling)
    elif chat:
        questions = [[*begin, {"role": "user", "content": prompt}] for prompt in prompts]
        for text in api.generate(model, tokenizer, questions, **sampling):
            print(text)
    else:
        texts = api.generate(model, tokenizer, prompts, special=special, **sampling)
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text)


def _check(has_prompts: bool, chat: bool, system: str | None, special: bool) -> None:
    """Raises UserError where options do not go together."""
    if not has_prompts and not chat:
        raise UserError("PROMPT is missing: a text to continue, or --chat to talk line by line")
    if system is not None and not chat:
        raise UserError("--system: the begin of a chat; give --chat, too")
    if special and chat:
        raise UserError("--special: with --chat the template makes all special tokens; a message is text")


def _unescaped(text: str) -> str:
    """A text as it is typed between quotes, where a shell leaves a line's end as two characters."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], text)
