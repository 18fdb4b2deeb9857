"""ONNX Runtime: runs a graph from its file, on the CPU, or on a GPU if its CUDA provider is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from tgate_trt.engines.base import check, given
from tgate_trt.errors import BundleError, GateError, UnsupportedError
from tgate_trt.specs import GraphSpec, TensorSpec

_DTYPES = ("float32", "float16", "int64")


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session, its tensors bound to the caller's memory.

    A tensor is bound again only if its address or shape changed, so buffers at fixed addresses, such as the fidelity graph's caches,
    are bound once.
    """

    spec: GraphSpec
    """The graph's inputs and outputs."""
    device: torch.device
    """The device that must hold the tensors that `run` receives."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        *,
        device: torch.device | None = None,
        threads: int | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: the ONNX file; its weights are where it refers to them.
            spec: the graph's inputs and outputs.
            device: ``cpu`` or a CUDA device; if None, a CUDA device where ONNX Runtime can use one.
            threads: CPU threads of one operator; one for each core if None.
            changed: weights that differ from those of the file, by name.

        Raises:
            UnsupportedError: if ONNX Runtime cannot use the device or a dtype here.
            BundleError: if the file cannot be loaded.
        """
        self.spec, self.device = spec, device or default_device()
        if self.device.type == "cuda" and not cuda_is_available():
            raise UnsupportedError("ONNX Runtime cannot use CUDA here: install onnxruntime-gpu, or use device='cpu'")
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.dtype not in _DTYPES:
                raise UnsupportedError(
                    f"ONNX Runtime has no {tensor.dtype} kernels for {tensor.name!r}; build with --precision fp32 or fp16"
                )
        self._path, self._threads = path, threads
        self._weights = self._values(changed or {})
        self._closed = False
        self._session: Any = None
        self._binding: Any = None
        self._bound: dict[str, tuple[int, torch.Size]] = {}
        self._load()

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`. On a GPU the host waits for PyTorch's current stream first.

        Raises:
            GateError: if the engine was closed, or a tensor is missing or does not fit.
        """
        if self._closed:
            raise GateError(f"the {self.spec.name} engine has been closed; load the bundle again")
        if self._session is None:
            self._load()
        for tensor in self.spec.inputs:
            self._bind(tensor, given(self.spec, inputs, tensor), self._binding.bind_input)
        for tensor in self.spec.outputs:
            self._bind(tensor, given(self.spec, outputs, tensor), self._binding.bind_output)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(self._binding)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; see `tgate_trt.engines.base.Engine.replace_weights`."""
        self._weights = self._values(weights)
        self.unload()

    def unload(self) -> None:
        """Free the session until the engine runs again."""
        self._session = self._binding = None
        self._bound.clear()

    def close(self) -> None:
        """Free the session; the engine cannot run again."""
        self._closed = True
        self._weights = {}
        self.unload()

    def _values(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The weights among these that the graph has, as ONNX Runtime's values."""
        own = set(onnx_ir.load(self._path).graph.initializers) if weights else ()
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.cpu().contiguous().numpy())
            for name, tensor in weights.items()
            if name in own
        }

    def _load(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        # Workers that sleep between two operators take longer to wake than most operators of a small model take to run. Workers that
        # spin after a run would take the cores from the next one, which may be another engine's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
        on_cuda = self.device.type == "cuda"
        provider: Any = ("CUDAExecutionProvider", {"device_id": self.device.index or 0}) if on_cuda else "CPUExecutionProvider"
        try:
            self._session = onnxruntime.InferenceSession(str(self._path), options, providers=[provider])
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise BundleError(f"ONNX Runtime cannot load {self._path.name}: {reason}; build the bundle again") from error
        self._binding = self._session.io_binding()

    def _bind(self, spec: TensorSpec, tensor: Tensor, bind: Any) -> None:
        key = (tensor.data_ptr(), tensor.shape)
        if self._bound.get(spec.name) == key:
            return
        check(self.spec, spec, tensor, self.device)
        bind(spec.name, self.device.type, self.device.index or 0, numpy.dtype(spec.dtype).type, tuple(tensor.shape), tensor.data_ptr())
        self._bound[spec.name] = key


def cuda_is_available() -> bool:
    """Whether ONNX Runtime and PyTorch can both use a CUDA device here."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()


def default_device() -> torch.device:
    """A CUDA device where ONNX Runtime can use one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if cuda_is_available() else torch.device("cpu")
