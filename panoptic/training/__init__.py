"""One training step and what it needs: device, optimiser, freezing, checkpoints."""
