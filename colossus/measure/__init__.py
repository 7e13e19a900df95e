"""Probes that measure a machine."""
