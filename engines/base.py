"""The protocol of every engine, and checks of the tensors that it receives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tgate_trt.eager import torch_dtype
from tgate_trt.errors import GateError
from tgate_trt.specs import GraphSpec, TensorSpec


class Engine(Protocol):
    """One graph, ready to run."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's inputs and outputs."""

    @property
    def device(self) -> torch.device:
        """The device that must hold the tensors that `run` receives."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once on memory that the caller owns, on a GPU in order with PyTorch's current stream; an unloaded engine is loaded first.

        Args:
            inputs: contiguous tensors by name, with the dtypes and shapes of `spec`, all with the same number of rows.
            outputs: contiguous tensors by name, which are written.

        Raises:
            GateError: if a tensor is missing or does not fit `spec` and `device`, or the engine was closed.
        """

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; all others have the values with which the engine was built.

        Args:
            weights: by parameter name, of the same shapes and dtypes. An empty mapping restores the original weights.

        Raises:
            UnsupportedError: if the engine holds its weights and cannot replace them.
        """

    def unload(self) -> None:
        """Free memory until the engine runs again."""

    def close(self) -> None:
        """Free everything; the engine cannot run again."""


def given(spec: GraphSpec, tensors: Mapping[str, Tensor], tensor: TensorSpec) -> Tensor:
    """The caller's tensor for one of the inputs or outputs of a graph.

    Raises:
        GateError: if it is missing.
    """
    value = tensors.get(tensor.name)
    if value is None:
        raise GateError(f"the {spec.name} engine was not given {tensor.name!r}")
    return value


def check(spec: GraphSpec, tensor: TensorSpec, value: Tensor, device: torch.device) -> None:
    """Check that a tensor fits an input or output of a graph.

    Raises:
        GateError: if its shape, dtype, device or layout differs.
    """
    if not spec.admits(tensor, value.shape):
        bounds = ", ".join(f"{name} {size}" for name, size in spec.dimensions.items())
        raise GateError(f"{tensor.name!r} must have shape {list(tensor.shape)} with {bounds}, got {list(value.shape)}")
    if value.dtype != torch_dtype(tensor.dtype) or value.device.type != device.type or not value.is_contiguous():
        raise GateError(f"{tensor.name!r} must be a contiguous {tensor.dtype} tensor on {device}, got {value.dtype} on {value.device}")
