"""Before any test loads PyTorch: its threads wait briefly, as the command line has it, since the processes of
pytest share the cores."""

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # shells ignore it in what they start in the background
