"""Every architecture, one file each.

`Architecture` is the union of their configs and the only list of models: presets, checkpoints, the
command line and the contract tests read it. A new architecture adds its config here.
"""

from panoptic.models.detr import DETRConfig
from panoptic.models.jsis_net import JSISNetConfig
from panoptic.models.mask2former import Mask2FormerConfig
from panoptic.models.maskformer import MaskFormerConfig
from panoptic.models.panoptic_deeplab import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn import PanopticFCNConfig
from panoptic.models.panoptic_fpn import PanopticFPNConfig

Architecture = (
    PanopticDeepLabConfig
    | PanopticFPNConfig
    | PanopticFCNConfig
    | DETRConfig
    | JSISNetConfig
    | MaskFormerConfig
    | Mask2FormerConfig
)
