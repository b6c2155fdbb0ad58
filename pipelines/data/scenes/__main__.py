"""One drawing process of `write_scenes`."""

import sys

from pipelines.data.scenes.files import draw_part

draw_part(*sys.argv[1:])
