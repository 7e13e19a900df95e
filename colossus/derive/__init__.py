"""What a job leaves out, filled in: by the machine as measured, and by one dial, the length of the run.

`derive.model` and `derive.dial` need no PyTorch; what does is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colossus.derive.dial import dial
from colossus.derive.model import derive_data

if TYPE_CHECKING:
    from colossus.derive.fill import derive
    from colossus.derive.machine import choose_for_machine

__all__ = ["choose_for_machine", "derive", "derive_data", "dial"]


def __getattr__(name: str) -> Any:
    if name == "derive":
        from colossus.derive.fill import derive

        return derive
    if name == "choose_for_machine":
        from colossus.derive.machine import choose_for_machine

        return choose_for_machine
    raise AttributeError(f"module 'colossus.derive' has no attribute {name!r}")
