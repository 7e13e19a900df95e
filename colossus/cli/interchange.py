"""`colossus import` and `colossus export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    path: Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json and safetensors files.")],
    out: Annotated[
        Path | None, typer.Option(help="A new folder.", show_default="runs/NAME of the folder")
    ] = None,
) -> None:
    """Take over a published model, weights and tokenizer."""
    from colossus import api

    print(f"imported to {api.import_model(path, out, say=print)}")


def export_model(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    path: Annotated[Path, typer.Argument(help="A new folder.")],
    type: Annotated[
        str | None, typer.Option(help="Of the weights: fp32 or bf16.", show_default="as they are stored")
    ] = None,
) -> None:
    """Write a model as transformers and other tools load it."""
    from colossus import api

    print(f"exported to {api.export_model(run, path, type, say=print)}")
