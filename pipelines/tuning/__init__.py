"""Sweeps: search space, checks, concurrency, one trial, schedulers, progress and results."""
