"""The protocol that every engine keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tgate_trt.specs import GraphSpec


class Engine(Protocol):
    """One graph, ready to run."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's inputs and outputs."""

    @property
    def device(self) -> torch.device:
        """Where the tensors that `run` is given must lie."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None = None) -> None:
        """Run once, reading and writing memory that the caller owns.

        Args:
            inputs: contiguous tensors by name, as `spec` says, all with the same number of rows.
            outputs: contiguous tensors by name that are written.
            stream: CUDA stream to run on, for engines of a GPU.

        Raises:
            GateError: if a tensor is missing, or of another shape, dtype or device than `spec` says.
        """

    def close(self) -> None:
        """Free what the engine holds; it cannot run again."""
