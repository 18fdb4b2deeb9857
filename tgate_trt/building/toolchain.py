"""The packages whose versions decide the graphs of a build."""

from __future__ import annotations

from importlib import metadata

PACKAGES = ("tgate-trt", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def toolchain() -> dict[str, str]:
    """Their versions, by name."""
    return {package: metadata.version(package) for package in PACKAGES}
