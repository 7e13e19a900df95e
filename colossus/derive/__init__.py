"""What a job leaves out, filled in: by the machine as measured, and by one dial, the length of the run."""

from __future__ import annotations

from colossus.derive.dial import dial
from colossus.derive.fill import derive, derive_data
from colossus.derive.machine import choose_for_machine

__all__ = ["choose_for_machine", "derive", "derive_data", "dial"]
