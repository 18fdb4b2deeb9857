"""A denoiser of diffusers whose launches are captured into CUDA graphs, with nothing else changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tgate_trt.engines.graphs import GraphCache, Staging


def capture_calls(denoiser: nn.Module) -> None:
    """Let a denoiser on a GPU run plainly at its first call with tensors of some shapes, capture the second, and replay from then on.

    Its ``forward`` takes the same arguments as before and returns a copy of the prediction, as a tuple.
    """
    plain, graphs, staging = denoiser.forward, GraphCache(type(denoiser).__name__), Staging()
    predictions: dict[Any, Tensor] = {}

    def forward(*arguments: Any, return_dict: bool = False, **keywords: Any) -> tuple[Tensor]:
        leaves, form = tree_flatten((arguments, keywords))
        own = [staging.copied(f"{place}", leaf) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(leaves)]
        key = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)

        def launch() -> None:
            given, named = tree_unflatten(own, form)
            predictions[key] = plain(*given, **named, return_dict=False)[0]

        graphs.run(key, launch)
        return (predictions[key].clone(),)

    denoiser.forward = forward
