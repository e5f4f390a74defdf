"""How good a network is: metrics, calibration, mistakes and the report."""
