"""Pages of HTML that need nothing else: their style, and the parts that several reports share."""
