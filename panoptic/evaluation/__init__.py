"""Evaluation of a model: counts that add up, figures, oracles."""
