"""The papers' tables as data, a file a paper."""

from pipelines.studies import detr, jsis, panoptic_fcn, report
from pipelines.studies.table import Study

STUDIES: dict[str, Study] = {
    name: study for module in (report, jsis, panoptic_fcn, detr) for name, study in module.STUDIES.items()
}
"""By the name of `--study`."""
