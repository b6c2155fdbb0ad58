"""The report of an evaluation: `page.page` writes it, `examples` chooses and draws its images."""
