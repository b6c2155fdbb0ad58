"""Blocks that two architectures or more share."""
