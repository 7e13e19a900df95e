"""Machines as data: what was measured of this one. Nothing here imports torch."""
