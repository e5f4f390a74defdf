"""What a servable model is: manifest, image preprocessing, ONNX Runtime predictors, errors."""
