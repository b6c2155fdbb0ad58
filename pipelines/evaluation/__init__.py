"""Evaluation of stored models, once or by the clock; prediction; reports."""
