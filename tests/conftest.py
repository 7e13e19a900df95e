"""Before any test loads PyTorch: its threads wait briefly, as the command line has it, since the processes of
pytest share the cores. Tests send SIGINT, which shells ignore in what they start in the background. Examples
of hypothesis may take as long as a busy machine makes them. PyTorch's compiler loads setuptools, which, late
in a process of many tests, once took the standard library's distutils for its own and refused it."""

import os
import signal

import setuptools  # noqa: F401
from hypothesis import HealthCheck, settings

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
