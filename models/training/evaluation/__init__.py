"""Evaluation: metrics, calibration, mistakes and the report."""
