"""Starts the ranks of a job, here or on a cluster."""
