"""Logical state to storage and back: asynchronous saves, verified reads, retention.

`save.Saver` writes, `load.open_checkpoint` reads, `find.latest` tells which one is the newest whole one.
What a checkpoint looks like on storage stands in `format`.
"""
