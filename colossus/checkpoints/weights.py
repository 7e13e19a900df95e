"""The weights of a model, wherever they lie: a run, or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from colossus.architecture import Architecture
from colossus.checkpoints.load import Checkpoint


@dataclass(frozen=True)
class Weights:
    """A model that can be loaded. tokenizer: the folder of its tokenizer."""

    path: Path
    arch: Architecture
    tokenizer: Path
    checkpoint: Checkpoint

    def load_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills the tensors of a model, by name, whole or sharded, and its buffers where they were kept.

        Raises:
            UserError: one is missing, or of another shape. MachineError: what is there is damaged.
        """
        buffers = {name for name, kind in self.checkpoint.names() if kind == "buffer"}
        keyed = {(name, "buffer" if name in buffers else "weight"): t for name, t in tensors.items()}
        self.checkpoint.load_into(keyed)
