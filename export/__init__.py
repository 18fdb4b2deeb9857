"""From PyTorch to ONNX: trace once with named taps, cut, keep the weights beside the graphs, verify."""
