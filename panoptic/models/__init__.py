"""Every architecture, a folder each.

`Architecture` is the union of their configs and the only list of models: presets, checkpoints, the
command line and the contract tests read it. A new architecture adds its config here.
"""

from panoptic.models.detr.config import DETRConfig
from panoptic.models.efficientps.config import EfficientPSConfig
from panoptic.models.eomt.config import EoMTConfig
from panoptic.models.jsis_net.config import JSISNetConfig
from panoptic.models.mask2former.config import Mask2FormerConfig
from panoptic.models.maskformer.config import MaskFormerConfig
from panoptic.models.panoptic_deeplab.config import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn.config import PanopticFCNConfig
from panoptic.models.panoptic_fpn.config import PanopticFPNConfig

Architecture = (
    PanopticDeepLabConfig
    | PanopticFPNConfig
    | PanopticFCNConfig
    | DETRConfig
    | JSISNetConfig
    | MaskFormerConfig
    | Mask2FormerConfig
    | EfficientPSConfig
    | EoMTConfig
)
