"""What a bundle is asked to be: the arguments of a build, checked, with what was left out filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tgate_trt.backends import BACKENDS, ONNXRUNTIME, PYTORCH, UNCOMPILED
from tgate_trt.engine_sets import EngineRequest
from tgate_trt.engines.tensorrt_flavours import TENSORRT, gpu_is_present
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.specs import MAXIMUM_ROWS, PRECISIONS, Bounds
from tgate_trt.taps import recipe

if TYPE_CHECKING:
    from tgate_trt.model_source import ModelSource


FUSIONS = ("plugin", "function", "off")
"""How the reuse of the cache runs: as a TensorRT plugin, and as a local function for the other backends; as a local function
for all; or as the addition and the norm that were traced."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a bundle is to be built for; each field is a reason to build again when it changes."""

    precision: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    batch_size: Bounds
    """Images."""
    graphs: tuple[str, ...]
    engines: EngineRequest
    verify: bool
    components: bool = True
    """Whether text encoders and the VAE's decoder become engines too."""
    discard_graphs: bool = False
    """Whether to leave out of the bundle what its engines do without: graphs and the denoiser's weights."""
    fuse_cache_reuse: str = "function"
    """``"function"`` if the reuse of the cache is one op of the graphs, ``"off"`` if it is an addition and a norm."""

    def rows(self, graph: str) -> Bounds:
        """Rows of a denoiser's graph: the fidelity graph runs without guidance, the others with or without."""
        images = self.batch_size
        if recipe(graph).takes_in:
            return images
        return Bounds(images.minimum, 2 * images.optimum, 2 * images.maximum)

    def to_json(self) -> dict[str, Any]:
        """The part that the manifest keeps as ``built_for``: what decides the graphs."""
        return {
            "precision": self.precision,
            "height": self.height,
            "width": self.width,
            "batch_size": str(self.batch_size),
            "fuse_cache_reuse": self.fuse_cache_reuse,
        }


def request_for(
    source: ModelSource,
    *,
    precision: str | None,
    height: int | None,
    width: int | None,
    batch_size: str,
    graphs: Sequence[str],
    engines: EngineRequest,
    verify: bool,
    components: bool,
    discard_graphs: bool,
    fuse_cache_reuse: str,
) -> Request:
    """Check what was asked for, and fill in what was not.

    Raises:
        InputError: if a value is impossible.
        UnsupportedError: if this version does not build it.
    """
    if source.denoiser_attribute != "unet":
        raise UnsupportedError(f"{source.name} is a transformer; this version builds UNets")
    on_cpu = ONNXRUNTIME in engines.backends or (PYTORCH in engines.backends and not gpu_is_present())
    precision = precision or ("fp32" if on_cpu else "fp16")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bf16":
        raise UnsupportedError("this version builds fp32 and fp16; ONNX Runtime, which verifies a build, has no bf16 kernels on the CPU")
    images = Bounds.parse(batch_size)
    if 2 * images.maximum > MAXIMUM_ROWS:
        raise InputError(f"a run may have at most {MAXIMUM_ROWS // 2} images, got batch size {images}")
    for graph in graphs:
        recipe(graph)
    if discard_graphs and (set(UNCOMPILED) & set(engines.backends) or engines.weights != "baked"):
        raise InputError(
            "--discard-graphs is for TensorRT engines with --weights baked alone; the others read the bundle's graphs or weights"
        )
    height, width = height or source.height, width or source.width
    source.signature(height, width, precision)
    return Request(
        precision, height, width, images, tuple(dict.fromkeys(graphs)), engines, verify, components, discard_graphs, fuse_cache_reuse
    )


def fusion_for(fuse_cache_reuse: str | None) -> tuple[str, bool | None]:
    """What `Request.fuse_cache_reuse` and `EngineRequest.plugins` become.

    Raises:
        InputError: if there is no such way.
    """
    if fuse_cache_reuse is not None and fuse_cache_reuse not in FUSIONS:
        raise InputError(f"--fuse-cache-reuse is one of {', '.join(FUSIONS)}, got {fuse_cache_reuse!r}")
    plugins = None if fuse_cache_reuse is None else fuse_cache_reuse == "plugin"
    return "off" if fuse_cache_reuse == "off" else "function", plugins


def backends_for(backend: str | Sequence[str] | None) -> tuple[str, ...]:
    """The backends that were asked for: TensorRT where it is installed and sees a GPU, else ONNX Runtime, if none was.

    Raises:
        UnsupportedError: if there is no such backend.
    """
    if not backend:
        return (TENSORRT.backend,) if gpu_is_present() and TENSORRT.is_installed() else (ONNXRUNTIME,)
    names = backend.split(",") if isinstance(backend, str) else backend
    for name in names:
        if name not in BACKENDS:
            raise UnsupportedError(f"this version does not build for {name!r}; it builds for {', '.join(BACKENDS)}")
    return tuple(dict.fromkeys(names))
