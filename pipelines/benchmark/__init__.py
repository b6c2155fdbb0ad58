"""Measurements against the published implementations: see `jobs/benchmark.py`."""
