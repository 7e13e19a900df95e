"""From published checkpoints to runs of ours, and back."""

from colossus.interchange.export import export_model
from colossus.interchange.importing import import_model

__all__ = ["export_model", "import_model"]
