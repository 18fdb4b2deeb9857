"""The models that are measured by name, and the bundles that they are measured in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tgate_trt.backends import ONNXRUNTIME
from tgate_trt.builder import add_graph, build
from tgate_trt.bundle import MANIFEST, Bundle
from tgate_trt.errors import InputError
from tgate_trt.taps import GRAPHS


@dataclass(frozen=True)
class Preset:
    """How a named model is measured unless the command says otherwise."""

    size: int | None
    """Side of its pictures in pixels; the model's own if None."""
    random_weights: bool
    rounds: int
    """Fewer where a round takes minutes."""


PRESETS: Mapping[str, Preset] = {
    "shapes": Preset(size=None, random_weights=False, rounds=15),
    "sd15": Preset(size=256, random_weights=True, rounds=3),
}

OF_A_BUNDLE = Preset(size=None, random_weights=False, rounds=5)
"""For a bundle that is given by its folder."""


def preset_of(model: str) -> Preset:
    """How a model is measured.

    Raises:
        InputError: if it is neither a name of `PRESETS` nor a bundle.
    """
    if model in PRESETS:
        return PRESETS[model]
    if (Path(model) / MANIFEST).is_file():
        return OF_A_BUNDLE
    raise InputError(f"--model takes {' or '.join(PRESETS)}, or the folder of a bundle; got {model!r}")


def open_bundle(model: str) -> Bundle:
    """A bundle with every graph that is compared, cut from one trace: the one that is there, or a new one.

    Args:
        model: a name of `PRESETS`, or the folder of a bundle.
    """
    preset = preset_of(model)
    if preset is not OF_A_BUNDLE:
        return build(
            model,
            height=preset.size,
            width=preset.size,
            backend=ONNXRUNTIME,
            precision="fp32",
            graphs=tuple(GRAPHS),
            random_weights=preset.random_weights,
            verify=not preset.random_weights,
            components=False,
        )
    bundle = Bundle.open(model)
    for graph in GRAPHS:
        bundle = add_graph(bundle, graph)
    return bundle
