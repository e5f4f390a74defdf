"""Export a training run to a verified bundle: serving graph, ONNX export, parity, model card."""
