"""Training on Ray Train: the driver, what is checked before it, the worker."""
