"""Interchange with Hugging Face: published checkpoints, read and written in bands of bounded memory."""
