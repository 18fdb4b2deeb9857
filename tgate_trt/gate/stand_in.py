"""Modules that stand where a module of diffusers or transformers stood, and run something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from tgate_trt.errors import UnsupportedError


class StandIn(nn.Module):
    """Stands where a module stood, as a module compiled by `torch.compile` does.

    diffusers knows compiled modules: a pipeline describes and saves the module behind one, ``_orig_mod``. So this class passes for
    one (``__class__``).
    """

    def __init__(self, replaces: nn.Module, eager: Callable[[], nn.Module] | None = None) -> None:
        """Stand where a module stood.

        Args:
            replaces: that module, or its architecture on the ``meta`` device.
            eager: gives it with its weights, if it is an architecture.
        """
        super().__init__()
        # Past nn.Module's registry: the replaced module must not move with `.to()`.
        object.__setattr__(self, "replaces", replaces)
        if eager is not None:
            object.__setattr__(replaces, "save_pretrained", _Saving(eager))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """That of compiled modules."""
        return OptimizedModule

    @property
    def _orig_mod(self) -> nn.Module:
        replaced: nn.Module = self.__dict__["replaces"]
        return replaced

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedError("a pipeline with engines cannot be copied; load the bundle again with tgate_trt.load")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError("a pipeline with engines cannot be pickled; load the bundle in the other process with tgate_trt.load")


class _Saving:
    """`save_pretrained` of an architecture without weights: it is that of the module with weights."""

    def __init__(self, eager: Callable[[], nn.Module]) -> None:
        self._eager = eager

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        eager: Any = self._eager()
        eager.save_pretrained(save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size)
