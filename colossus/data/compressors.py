"""The compressors that a model is held against."""

COMPRESSORS = {"gzip": "gzip -9", "bz2": "bz2 -9", "xz": "xz -9e"}
"""By name, as columns and events have it (`gzip_bytes`, `gzip_bits_per_byte`), what one would type."""

LEAST_BYTES = 256  # of a document, on average


def have_work(num_documents: int, num_bytes: int) -> bool:
    """Whether documents of so many bytes together give compressors something to work on: of a short text,
    such as an answer, their own frame is most of what they write (18 bytes of gzip, 60 of xz)."""
    return num_bytes >= LEAST_BYTES * num_documents
