"""PyTorch to ONNX: trace once with named taps, cut, keep the weights apart, verify."""
