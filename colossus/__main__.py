"""`python -m colossus`: the same as the command `colossus`."""

from __future__ import annotations

import sys

from colossus.cli import main

if __name__ == "__main__":
    sys.exit(main())
