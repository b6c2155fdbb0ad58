"""The papers' tables as data, one file a source document, and what covers each table of each document.

| file | document |
|---|---|
| `coco_challenges` | "Image Panoptic Segmentation Challenges using COCO Dataset": Panoptic-DeepLab, Panoptic FPN |
| `jsis_net` | paper "Panoptic Segmentation with a Joint Semantic and Instance Segmentation Network" |
| `panoptic_deeplab_pytorch` | report "Panoptic-DeepLab in PyTorch" |
| `panoptic_fcn` | slides of "Fully Convolutional Networks for Panoptic Segmentation" |
| `detr_cityscapes_slides` | slides "Panoptic Segmentation (research topic 12)": DETR on Cityscapes |
| `freezing` | ours, in the form of tables 2 and 3 of the first document, whose figures stand beside |
| `trunks` | ours, with figures of Mask2Former's paper (arXiv 2112.01527) |
"""

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Image Panoptic Segmentation Challenges using COCO Dataset": {
        "table 1, the default Panoptic-DeepLab": ("deeplab-default",),
        "table 2, stages frozen": ("freezing-r50",),
        "table 3, stages frozen, ResNet-101": ("freezing-r101",),
        "table 4, pyramid pooling": ("aspp",),
        "table 5, dilations": ("dilation",),
        "table 6, batch size": ("batch",),
        "section 3.3.5, weight decay": ("weight-decay",),
        "table 7, double 3x3": ("fpn-double3x3",),
        "table 8, VGG": ("fpn-vgg",),
        "table 9, Res2Net": ("fpn-res2net",),
        "table 10, the authors' contributions": (),
    },
    "Panoptic Segmentation with a Joint Semantic and Instance Segmentation Network": {
        "table 1, results": ("jsis-results",),
        "table 2, weights of the losses: the defaults of JSISNetConfig": (),
        "table 3, joint training": ("joint",),
        "table 4, recall of proposals": ("rpn-recall",),
    },
    "Panoptic-DeepLab in PyTorch": {
        "table 1, reimplementation and original": ("deeplab-cityscapes", "deeplab-gap"),
        "table 2, oracles": ("deeplab-oracle",),
        "section 4, the ego car": ("deeplab-foreground",),
    },
    "Towards Fully Convolutional Panoptic Segmentation": {
        "table 1, kernel generator": ("fcn-kernels",),
        "table 2, coordinates": ("fcn-coordinates",),
        "table 3, kernel fusion": ("fcn-fusion",),
        "table 4, channels of the encoder": ("fcn-channels",),
        "table 5, high-resolution feature": ("fcn-feature",),
        "table 6, weighted dice": ("fcn-points",),
        "table 7, schedule": ("fcn-schedule",),
        "table 8, deformable encoder": ("fcn-star",),
        "table 9, true positions and classes": ("fcn-oracle",),
        "table 10, methods on COCO val": ("fcn-methods",),
        "table 11, methods on COCO test-dev": ("fcn-test-dev",),
        "table 12, methods on Cityscapes": ("fcn-cityscapes",),
        "table 13, methods on Mapillary Vistas": ("fcn-mapillary",),
        "slide Future Work": ("fcn-merge", "fcn-centres"),
    },
    "Panoptic Segmentation (research topic 12)": {
        "hyperparameters of the models evaluated: preset detr-004-cityscapes": (),
        "PQ, SQ, RQ and mean IoU of versions 119 and 125; their losses": ("detr-augmentation",),
        "mean IoU on IKA": ("detr-datasets",),
        "losses of versions 119 and 80": ("detr-head",),
        "losses of versions 109 to 112": ("detr-freezing",),
        "slide Training, what was tried": (
            *("detr-length", "detr-lr", "detr-rates", "detr-batch", "detr-size", "detr-longest", "detr-clip"),
        ),
        "slides Limitations and Future Scope": ("detr-balance", "detr-rotation"),
    },
}
"""Studies that cover each table of each document; none where it has no figures of a model."""
