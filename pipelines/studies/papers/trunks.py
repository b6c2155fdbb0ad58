"""One head on backbones of several kinds: Mask2Former's recipe for COCO, with its paper's figures where it has any.

A table of ours. Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation" (arXiv 2112.01527),
prints ResNets and Swins; nobody printed a ConvNeXt or a plain ViT under this head and recipe.
"""

from pipelines.studies.study import Row, Study

NAME, DROP = "model.backbone.name", "model.backbone.drop_path"

PRESET = "mask2former-swin-tiny-coco"
"""Mask2Former's recipe for COCO with the norms of every backbone but a ResNet's, which that of ResNets freezes."""

STUDIES = {
    "trunks": Study(
        title="Mask2Former on a ResNet, a Swin, a ConvNeXt and a plain ViT of about one size",
        preset=PRESET,
        small="mask2former-pedestrians",
        columns=("PQ", "things", "stuff", "mIoU"),
        begins="ImageNet",
        rows=(
            Row("ResNet-50", {NAME: "resnet50"}, "51.9 - - 61.7", preset="mask2former-r50-coco"),
            Row("Swin-T", {NAME: "swin_tiny", DROP: 0.3}, "53.2 - - 63.2"),
            Row("ConvNeXt-T", {NAME: "convnext_tiny", DROP: 0.0}),
            Row("ViT-S", {NAME: "vit_small_patch14_reg4_dinov2", DROP: 0.0}),
        ),
        note="The paper's rows begin with ImageNet-1k weights; the ViT has DINOv2's under --model.backbone.weights "
        "imagenet, and ViTDet's simple feature pyramid. All rows keep Mask2Former's rates and drop no paths but "
        "Swin's. With --small the backbones are ResNet-18, Swin-T (there is no smaller one), ConvNeXt-F and ViT-Ti, "
        "from scratch.",
    ),
}
