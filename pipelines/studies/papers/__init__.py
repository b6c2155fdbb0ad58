"""The papers' tables as data, one file a source document.

| file | document |
|---|---|
| `coco_challenges` | "Image Panoptic Segmentation Challenges using COCO Dataset": Panoptic-DeepLab, Panoptic FPN |
| `jsis_net` | paper "Panoptic Segmentation with a Joint Semantic and Instance Segmentation Network" |
| `panoptic_fcn` | slides of "Fully Convolutional Networks for Panoptic Segmentation" |
| `detr_cityscapes_slides` | slides "Panoptic Segmentation (research topic 12)": DETR on Cityscapes |
| `trunks` | ours, with figures of Mask2Former's paper (arXiv 2112.01527) |

The table of "Panoptic-DeepLab in PyTorch" is one of oracles, which trains nothing: `jobs/oracle.py`.
"""
