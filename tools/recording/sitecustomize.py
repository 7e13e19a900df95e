"""Imported by every Python that starts with this folder in PYTHONPATH."""

import recorder  # type: ignore[import-not-found]

recorder.start()
