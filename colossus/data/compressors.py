"""The compressors that a model is held against."""

COMPRESSORS = {"gzip": "gzip -9", "bz2": "bz2 -9", "xz": "xz -9e"}
"""By name, as columns and events have it (`gzip_bytes`, `gzip_bits_per_byte`), what one would type."""
