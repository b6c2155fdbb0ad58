"""The parts that MaskFormer and Mask2Former share: options, pixel decoders, losses, point sampling, post-processing."""
