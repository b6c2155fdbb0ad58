"""Backbones: ResNet, Res2Net, VGG and Swin of our own, or any pyramid of timm, behind one configuration."""

from panoptic.backbones.config import Backbone

__all__ = ["Backbone"]
