"""Load a bundle's engines."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tgate_trt.bundle.backends import ONNXRUNTIME, PYTORCH, has_engine
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.components import component_of, weight_files
from tgate_trt.bundle.folder import beside
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.bundle.manifest import graph_file
from tgate_trt.eager import torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.engines.tensorrt_flavours import FLAVOURS
from tgate_trt.errors import StaleBundleError, UnsupportedError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.specs import CACHE_PREFIX, LONGEST_TEXT, MAXIMUM_ROWS, ROWS, TOKENS, Bounds, GraphSpec
from tgate_trt.taps import is_of_denoiser, recipe

if TYPE_CHECKING:
    from tgate_trt.engines.shared_weights import SharedWeights
    from tgate_trt.engines.tensorrt import Arena, RuntimeOptions


@dataclasses.dataclass
class EngineLoader:
    """Loads engines of one backend of a bundle; they share what engines of one pipeline can share."""

    bundle: Bundle
    backend: str
    device: torch.device
    threads: int | None = None
    """CPU threads of an engine; one a core if None."""
    cuda_graphs: bool = True
    """Whether engines of TensorRT and PyTorch capture their launches on a GPU, and replay them."""
    specialisation: str = "lazy"
    """When TensorRT-RTX compiles kernels for a shape: ``"lazy"``, ``"eager"`` or ``"none"``."""
    compile: bool = False
    """Whether PyTorch's engines run `torch.compile`'s code."""

    def __post_init__(self) -> None:
        """Read the LoRAs that were put into the bundle, once for all engines."""
        self.loras = BundleLoras.read(self.bundle)
        self.changed_weights = cache(self.loras.weights)
        self._arena: Arena | None = None
        self._shared: dict[tuple[Path, ...], SharedWeights] = {}
        self._state: dict[str, Tensor] = {}

    @property
    def shares_weights(self) -> bool:
        """Whether all engines of this loader have one copy of the weights, so that one more costs next to no memory."""
        return self.backend == PYTORCH or (
            self.backend in FLAVOURS and self.bundle.manifest.engines[self.backend].options["weights"] != "baked"
        )

    def load(self, graph: str) -> Engine:
        """Load one engine, with the LoRAs that were put into the bundle.

        Raises:
            BundleError: if the bundle holds no such engine, or it cannot be loaded.
            InputError: if there is no such specialisation.
            UnsupportedError: if this machine lacks the backend.
        """
        spec = self.bundle.graph(graph)
        path = self.bundle.folder / self.bundle.manifest.engines[self.backend].files[graph]
        if self.backend == PYTORCH:
            return self._load_module(path, spec)
        changed = self.changed_weights(component_of(self.bundle, graph))
        if self.backend == ONNXRUNTIME:
            from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine

            self.bundle.load_graph(path.name)  # for its check
            return OnnxRuntimeEngine(path, self._of_any_batch(spec), device=self.device, threads=self.threads, changed=changed)
        return self._load_plan(path, spec, changed)

    def load_vanilla(self) -> Engine | None:
        """The engine for planning steps whose cross-attention is not reused, where it costs next to no memory; else None.

        In PyTorch it is the denoiser itself, on the same weights; of TensorRT the bundle must hold it, with weights that are inputs.
        """
        if self.backend == PYTORCH and not has_engine(self.bundle, "vanilla", PYTORCH):
            engines = self.bundle.manifest.engines[PYTORCH]
            planning = self.bundle.graph("planning")
            outputs = tuple(tensor for tensor in planning.outputs if not tensor.name.startswith(CACHE_PREFIX))
            spec = dataclasses.replace(planning, name="vanilla", outputs=outputs)
            return self._load_module(self.bundle.folder / engines.files["planning"], spec)
        return self.load("vanilla") if self.shares_weights and has_engine(self.bundle, "vanilla", self.backend) else None

    def _load_module(self, weights: Path, spec: GraphSpec) -> Engine:
        """The denoiser in PyTorch; all graphs share its weights."""
        from tgate_trt.engines.projections import arranged
        from tgate_trt.engines.pytorch import PyTorchEngine, PyTorchOptions

        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("PyTorch cannot use CUDA here; use device='cpu'")
        if not self._state:
            state = load_file(weights, device=str(self.device))
            self._state = arranged(state) if self.device.type == "cuda" else state
        built_for = self.bundle.manifest.built_for
        architecture = self.bundle.denoiser_on_meta(torch_dtype(built_for.precision))
        changed = self.changed_weights(self.bundle.manifest.model.attribute)
        options = PyTorchOptions(self.cuda_graphs, self.compile, self.threads, built_for.fuse_cache_reuse)
        names = {tensor.name for tensor in spec.inputs}
        absent = [tensor for tensor in self.bundle.manifest.signature.inputs if tensor.name not in names]
        spec = self._of_any_batch(spec)
        return PyTorchEngine(architecture, self._state, spec, recipe(spec.name), self.device, options, changed=changed, absent=absent)

    def _of_any_batch(self, spec: GraphSpec) -> GraphSpec:
        """The spec without its profile: an engine that is not compiled takes every batch and prompt for which the trace holds."""
        most = self.bundle.manifest.signature.dimensions[ROWS].maximum if is_of_denoiser(spec.name) else MAXIMUM_ROWS
        any_batch = {ROWS: Bounds(1, min(spec.dimensions[ROWS].optimum, most), most)}
        any_text = {TOKENS: LONGEST_TEXT} if TOKENS in spec.dimensions else {}
        return dataclasses.replace(spec, dimensions={**spec.dimensions, **any_text, **any_batch})

    def _load_plan(self, path: Path, spec: GraphSpec, changed: dict[str, Tensor]) -> Engine:
        from tgate_trt.engines.shared_weights import SharedWeights
        from tgate_trt.engines.tensorrt import Arena, TensorRTEngine

        if self.device.type != "cuda":
            raise UnsupportedError(
                f"{self.backend} runs on an NVIDIA GPU, not on {self.device}; use device='cuda' or backend='onnxruntime'"
            )
        if self._arena is None:
            self._arena = Arena(self.device)
        files, weights = weight_files(self.bundle, spec.name), None
        if self.bundle.manifest.engines[self.backend].options["weights"] != "baked":
            weights = self._shared[files] = self._shared.get(files) or SharedWeights(files, self._arena.device)
        return TensorRTEngine(
            path,
            spec,
            FLAVOURS[self.backend],
            self._arena,
            weights=weights,
            graph=self.bundle.folder / graph_file(spec.name),
            options=runtime_options(self.bundle, self.cuda_graphs, self.specialisation),
            changed=changed,
        )


def runtime_options(bundle: Bundle, cuda_graphs: bool = True, specialisation: str = "lazy") -> RuntimeOptions:
    """How plans of a bundle are run; what TensorRT-RTX compiles is kept beside it.

    Raises:
        InputError: if there is no such specialisation.
    """
    from tgate_trt.engines.tensorrt import RuntimeOptions

    return RuntimeOptions(cuda_graphs, specialisation, beside(bundle.folder) / "compiled")


def load_engine(bundle: Bundle, graph: str, *, backend: str, device: torch.device | None = None, threads: int | None = None) -> Engine:
    """Load one engine of a bundle; see `EngineLoader.load`."""
    return EngineLoader(bundle, backend, device or best_device(backend), threads).load(graph)


def eager_denoiser(loras: BundleLoras, dtype: torch.dtype) -> nn.Module:
    """The denoiser in eager PyTorch on the CPU, with a bundle's weights and LoRAs fused into them.

    Raises:
        StaleBundleError: if the bundle's weights were discarded.
    """
    bundle = loras.bundle
    if WEIGHTS_FILE not in bundle.manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no weights of the denoiser; build it again without --discard-graphs")
    denoiser = bundle.denoiser_on_meta(dtype)
    weights = {**load_file(bundle.folder / WEIGHTS_FILE), **loras.weights(bundle.manifest.model.attribute)}
    denoiser.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return denoiser.requires_grad_(False)


def best_device(backend: str) -> torch.device:
    """Where a backend runs best on this machine."""
    if backend == ONNXRUNTIME:
        from tgate_trt.engines.onnxruntime import default_device

        return default_device()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
