"""Training: one step and what it needs (device, optimiser, freezing), checkpoints and what another run takes over."""
