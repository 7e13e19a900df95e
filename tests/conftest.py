"""Before any test loads PyTorch: its threads wait briefly, as the command line has it, since the processes of
pytest share the cores."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
