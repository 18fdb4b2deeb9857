"""ONNX Runtime: runs a graph as it is, on the CPU, or on a GPU where its CUDA provider is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor

from tgate_trt.errors import BundleError, GateError, UnsupportedError
from tgate_trt.specs import GraphSpec, TensorSpec

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session, its tensors bound to the caller's memory.

    A tensor is bound again only when it has moved or changed shape, so buffers at fixed addresses, such as the caches
    of the fidelity graph, are bound once.
    """

    def __init__(self, path: Path, spec: GraphSpec, *, device: torch.device | None = None, threads: int | None = None) -> None:
        """Load a graph.

        Args:
            path: the ONNX file; its weights file lies beside it.
            spec: what the graph takes and gives.
            device: ``cpu`` or a CUDA device; a CUDA device where one can be used, if None.
            threads: CPU threads for one operator; as many as there are cores, if None.

        Raises:
            UnsupportedError: if the device or the dtype is not to be had here.
            BundleError: if the file cannot be loaded.
        """
        self._spec = spec
        self._device = device or default_device()
        if self._device.type == "cuda" and not cuda_is_available():
            raise UnsupportedError("ONNX Runtime cannot use CUDA here: install onnxruntime-gpu, or use device='cpu'")
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.dtype not in _TORCH_DTYPES:
                raise UnsupportedError(
                    f"ONNX Runtime has no {tensor.dtype} kernels for {tensor.name!r}; build with --precision fp32 or fp16"
                )
        self._session: Any = _load(path, self._device, threads)
        self._binding: Any = self._session.io_binding()
        self._bound: dict[str, tuple[int, torch.Size]] = {}

    @property
    def spec(self) -> GraphSpec:
        """The graph's inputs and outputs."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where the tensors that `run` is given must lie."""
        return self._device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None = None) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`. ONNX Runtime synchronises by itself, so ``stream`` is not used."""
        if self._session is None:
            raise GateError(f"the {self._spec.name} engine has been closed; load the bundle again")
        for tensor in self._spec.inputs:
            self._bind(tensor, inputs.get(tensor.name), self._binding.bind_input)
        for tensor in self._spec.outputs:
            self._bind(tensor, outputs.get(tensor.name), self._binding.bind_output)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        """Free the session; the engine cannot run again."""
        self._session = self._binding = None
        self._bound.clear()

    def _bind(self, spec: TensorSpec, tensor: Tensor | None, bind: Any) -> None:
        if tensor is None:
            raise GateError(f"the {self._spec.name} engine was not given {spec.name!r}")
        key = (tensor.data_ptr(), tensor.shape)
        if self._bound.get(spec.name) == key:
            return
        self._check(spec, tensor)
        bind(spec.name, self._device.type, self._device.index or 0, numpy.dtype(spec.dtype).type, tuple(tensor.shape), tensor.data_ptr())
        self._bound[spec.name] = key

    def _check(self, spec: TensorSpec, tensor: Tensor) -> None:
        fits = len(tensor.shape) == len(spec.shape) and all(
            size in self._spec.dimensions[expected] if isinstance(expected, str) else size == expected
            for size, expected in zip(tensor.shape, spec.shape, strict=True)
        )
        if not fits:
            bounds = ", ".join(f"{name} {size}" for name, size in self._spec.dimensions.items())
            raise GateError(f"{spec.name!r} must have shape {list(spec.shape)} with {bounds}, got {list(tensor.shape)}")
        if tensor.dtype != _TORCH_DTYPES[spec.dtype] or tensor.device.type != self._device.type or not tensor.is_contiguous():
            raise GateError(
                f"{spec.name!r} must be a contiguous {spec.dtype} tensor on {self._device}, got {tensor.dtype} on {tensor.device}"
            )


def cuda_is_available() -> bool:
    """Whether ONNX Runtime and PyTorch can both use a CUDA device here."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()


def default_device() -> torch.device:
    """A CUDA device where ONNX Runtime can use one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if cuda_is_available() else torch.device("cpu")


def _load(path: Path, device: torch.device, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # Idle workers of the planning engine would spin against the fidelity engine's for its first calls after the gate: on two
    # loaded cores a gated picture of the demo model takes half the time without, on two idle ones about the same.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider: Any = ("CUDAExecutionProvider", {"device_id": device.index or 0}) if device.type == "cuda" else "CPUExecutionProvider"
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(f"ONNX Runtime cannot load {path.name}: {reason}; build the bundle again") from error
