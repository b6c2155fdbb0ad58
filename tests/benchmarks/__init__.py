"""Measurements against the published implementations: see `tests/benchmarks/__main__.py`."""
