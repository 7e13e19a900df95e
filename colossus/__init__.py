"""Colossus: one job description that trains language models, from a laptop's CPU up.

The public functions are loaded when they are first used, so that `import colossus` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossus.api import (
        compare,
        dry_run,
        evaluate,
        evaluate_tasks,
        export_model,
        generate,
        import_model,
        load_job,
        load_model,
        plan,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "compare",
    "dry_run",
    "evaluate",
    "evaluate_tasks",
    "export_model",
    "generate",
    "import_model",
    "load_job",
    "load_model",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'colossus' has no attribute {name!r}")
    from colossus import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
