"""The arithmetic of performance: FLOPs of the parts, receipts of what was measured. Never imports torch."""
