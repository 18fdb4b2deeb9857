"""One copy of a model's weights at fixed addresses, for all engines that take weights as inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tgate_trt.errors import BundleError
from tgate_trt.files import read_named


class SharedWeights:
    """Weights by name on a device. Engines read them in place, and a replacement overwrites the same bytes."""

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        """Read safetensors files, a tensor at a time.

        Args:
            files: of the model's weights.
            device: to hold them.

        Raises:
            InputError: if a file cannot be read.
        """
        self._files, self._device = tuple(files), device
        self._tensors: dict[str, Tensor] = {}
        self._replaced: set[str] = set()
        for name, tensor in read_named(self._files):
            self._tensors[name] = tensor.to(device)

    def __getitem__(self, name: str) -> Tensor:
        """A weight, always at the same address.

        Raises:
            BundleError: if no weight has that name.
        """
        if name not in self._tensors:
            raise BundleError(f"the weights hold no {name!r}, which an engine takes; build the bundle again")
        return self._tensors[name]

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights, and restore those that were replaced before. On a GPU it waits until they are written.

        Args:
            weights: by name, all that differ from the files.

        Raises:
            BundleError: if a name is unknown, or a tensor has another shape or dtype; then nothing is written.
        """
        for name, value in weights.items():
            held = self[name]
            if (value.shape, value.dtype) != (held.shape, held.dtype):
                raise BundleError(
                    f"{name!r} is {held.dtype} {list(held.shape)} in the bundle and cannot become {value.dtype} {list(value.shape)}"
                )
        for name, tensor in read_named(self._files, self._replaced - set(weights)):
            self._tensors[name].copy_(tensor)
        for name, value in weights.items():
            self._tensors[name].copy_(value)
        if self._device.type == "cuda":  # engines that read them run on other streams
            torch.cuda.current_stream(self._device).synchronize()
        self._replaced = set(weights)

    def close(self) -> None:
        """Free the weights."""
        self._tensors.clear()
