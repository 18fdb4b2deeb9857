"""Whether each TensorRT builds and runs here, and for which GPUs: tried, each try in a process of its own, which it may take down."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from tgate_trt import children
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import FLAVOURS
from tgate_trt.errors import TGateError
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.specs import ROWS, Bounds, GraphSpec, TensorSpec

_WARM_UP = 3
"""A plain run, a capture, a replay."""


@dataclass(frozen=True)
class Try:
    """What one process tries."""

    backend: str
    capability: str | None
    """Compute capability that is built for; that of this machine's GPU if None."""


def probe() -> list[dict[str, Any]]:
    """Build and run a small network by each flavour, for this machine's GPU and for each compute capability that the flavour supports.

    Returns:
        JSON data, one entry a try: ``backend``, ``version``, ``capability``, and what came of it, an ``error`` or a ``relative_error``.
    """
    rows = []
    for backend, flavour in FLAVOURS.items():
        for capability in (None, *flavour.capabilities):
            try:
                row = children.run(attempt, Try(backend, capability), f"the try of {backend}", f"install another version of {backend}")
            except TGateError as error:
                row = {"error": str(error)}
            rows.append({"backend": backend, "version": flavour.version(), "capability": capability or "this GPU", **row})
    return rows


def attempt(task: Try) -> dict[str, Any]:
    """Build a convolution and a matrix product in fp16, run them, and compare with PyTorch in fp32.

    Raises:
        TGateError: if TensorRT cannot build or run them.
    """
    flavour = FLAVOURS[task.backend]
    spec = GraphSpec(
        "probe",
        (TensorSpec("sample", "float16", (ROWS, 64, 32, 32)), TensorSpec("weight", "float16", (64, 64, 3, 3))),
        (TensorSpec("noise_pred", "float16", (ROWS, 64, 32, 32)),),
        {ROWS: Bounds(1, 2, 4)},
    )
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float16[batch,64,32,32] sample, float16[64,64,3,3] weight) => (float16[batch,64,32,32] noise_pred) {
      filtered = Conv <pads = [1, 1, 1, 1]> (sample, weight)
      probabilities = Softmax <axis = -1> (filtered)
      noise_pred = MatMul (filtered, probabilities)
    }"""
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = Path(folder) / "probe.onnx", Path(folder) / "probe.plan"
        ir.save(ir.from_onnx_text(text), graph)
        options = PlanOptions(capabilities=(task.capability,) if task.capability else ())
        built = build_plan(flavour, graph, plan, spec, options)
        row: dict[str, Any] = {"plan_bytes": built["bytes"], "build_seconds": built["seconds"]}
        if not torch.cuda.is_available():
            return row | {"error": "built; there is no GPU here to run it"}
        from tgate_trt.engines.tensorrt import Arena, TensorRTEngine

        device = torch.device("cuda", torch.cuda.current_device())
        engine = TensorRTEngine(plan, spec, flavour, Arena(device))
        inputs = {name: value.to(device) for name, value in random_inputs(spec.inputs, 2, torch.Generator().manual_seed(0)).items()}
        inputs["weight"] *= 0.05
        outputs = {"noise_pred": torch.full((2, 64, 32, 32), torch.nan, dtype=torch.float16, device=device)}
        for _ in range(_WARM_UP):
            engine.run(inputs, outputs)
        filtered = torch.nn.functional.conv2d(inputs["sample"].float(), inputs["weight"].float(), padding=1)
        return row | {"relative_error": relative_error(outputs["noise_pred"], filtered @ filtered.softmax(-1))}
