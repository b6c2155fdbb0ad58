"""What the mask-classification models share: pixel decoders, losses, point sampling, post-processing."""
