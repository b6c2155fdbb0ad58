"""The papers' tables as data, a file a paper."""

from pipelines.studies.papers import coco_challenges_report, jsis_net, panoptic_fcn, panoptic_segmentation_report
from pipelines.studies.study import Study

STUDIES: dict[str, Study] = {
    name: study
    for module in (coco_challenges_report, jsis_net, panoptic_fcn, panoptic_segmentation_report)
    for name, study in module.STUDIES.items()
}
"""By the name of `--study`."""
