"""Measurements against the published implementations: see `__main__`."""
