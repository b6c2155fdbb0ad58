"""Every architecture, a folder each.

`Architecture` is the union of their configs and the only list of models: presets, checkpoints, the
command line and the contract tests read it. A new architecture adds its config here.
"""

from panoptic.models.detr.model import DETRConfig
from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig

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
