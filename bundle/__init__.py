"""Bundles: manifest, image preprocessing, ONNX Runtime predictors and errors."""
