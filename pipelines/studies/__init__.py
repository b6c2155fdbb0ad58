"""Studies: the papers' tables, trained anew on any data and at any budget."""

from pipelines.studies.papers import (
    coco_challenges,
    detr_cityscapes_slides,
    freezing,
    jsis_net,
    panoptic_deeplab_pytorch,
    panoptic_fcn,
    trunks,
)
from pipelines.studies.study import Study

STUDIES: dict[str, Study] = {
    name: study
    for module in (
        *(coco_challenges, jsis_net, panoptic_deeplab_pytorch, panoptic_fcn, detr_cityscapes_slides),
        *(freezing, trunks),
    )
    for name, study in module.STUDIES.items()
}
"""Every study by its name on the command line (`--study`)."""
