"""Values on their way from a GPU to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Fetched:
    """Copies of tensors on the host. On a GPU, asking for them waits for what was launched before the copies, and for nothing after."""

    def __init__(self, *tensors: Tensor) -> None:
        """Launch the copies on PyTorch's current stream."""
        self._copies = [_on_its_way(tensor) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def values(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def _on_its_way(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
