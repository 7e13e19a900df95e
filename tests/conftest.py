"""Before any test loads PyTorch: its threads wait briefly, as the command line has it, since the processes of
pytest share the cores. Tests send SIGINT, which shells ignore in what they start in the background."""

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
signal.signal(signal.SIGINT, signal.default_int_handler)
