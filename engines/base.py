"""The protocol that every engine keeps, and the checks of what a caller hands to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.specs import GraphSpec, TensorSpec


class Engine(Protocol):
    """One graph, ready to run."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's inputs and outputs."""

    @property
    def device(self) -> torch.device:
        """Where the tensors that `run` is given must lie."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None = None) -> None:
        """Run once, reading and writing memory that the caller owns; an engine that was unloaded is loaded first.

        Args:
            inputs: contiguous tensors by name, as `spec` says, all with the same number of rows.
            outputs: contiguous tensors by name that are written.
            stream: CUDA stream to run on, for engines of a GPU; PyTorch's current one if None.

        Raises:
            GateError: if a tensor is missing, or of another shape, dtype or device than `spec` says.
        """

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Run with other values of some weights from now on; the others are as they were built.

        Args:
            weights: by parameter's name, of the same shapes and dtypes; all that shall differ, so an empty mapping
                brings back what was built.

        Raises:
            UnsupportedError: if the engine holds its weights.
        """

    def unload(self) -> None:
        """Free the memory that the engine takes until it runs again."""

    def close(self) -> None:
        """Free what the engine holds; it cannot run again."""


def given(spec: GraphSpec, tensors: Mapping[str, Tensor], tensor: TensorSpec) -> Tensor:
    """The caller's tensor for one of a graph's inputs or outputs.

    Raises:
        GateError: if it is missing.
    """
    value = tensors.get(tensor.name)
    if value is None:
        raise GateError(f"the {spec.name} engine was not given {tensor.name!r}")
    return value


def check(spec: GraphSpec, tensor: TensorSpec, value: Tensor, device: torch.device) -> None:
    """Check a tensor against what a graph takes or gives.

    Raises:
        GateError: if its shape, dtype, device or layout is another.
    """
    fits = len(value.shape) == len(tensor.shape) and all(
        size in spec.dimensions[expected] if isinstance(expected, str) else size == expected
        for size, expected in zip(value.shape, tensor.shape, strict=True)
    )
    if not fits:
        bounds = ", ".join(f"{name} {size}" for name, size in spec.dimensions.items())
        raise GateError(f"{tensor.name!r} must have shape {list(tensor.shape)} with {bounds}, got {list(value.shape)}")
    if value.dtype != getattr(torch, tensor.dtype) or value.device.type != device.type or not value.is_contiguous():
        raise GateError(f"{tensor.name!r} must be a contiguous {tensor.dtype} tensor on {device}, got {value.dtype} on {value.device}")
