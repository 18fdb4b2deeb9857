"""Engines that run a graph, each with the protocol of `tgate_trt.engines.base`."""
