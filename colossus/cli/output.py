"""What becomes of output that nobody takes."""

from __future__ import annotations

import os
import sys


def nobody_reads_on() -> int:
    """`colossus models | head` is done when head is; what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
