"""ONNX to something that runs: one file an engine, behind the protocol of `tgate_trt.engines.base`."""
