"""Does each TensorRT build and run here, for which GPU, with which error otherwise: tried, each try in a process of its own.

The process is this module, run with a backend and a compute capability; it prints one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import FLAVOURS
from tgate_trt.errors import TGateError
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.specs import ROWS, Bounds, GraphSpec, TensorSpec

_WARM_UP = 3
"""A plain run, a capture, a replay."""


def probe() -> list[dict[str, Any]]:
    """Build and run a small network by each flavour, for this GPU and for each that it knows, each try in its own process."""
    tries = []
    for backend, flavour in FLAVOURS.items():
        for capability in (None, *flavour.capabilities):
            command = [sys.executable, "-P", "-m", __name__, backend, *([capability] if capability else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (done.stdout.strip().splitlines() or ["{}"])[-1]
            try:
                row = json.loads(last)
            except ValueError:
                row = {"error": last}
            if done.returncode and "error" not in row:
                row["error"] = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            tries.append({"backend": backend, "version": flavour.version(), "capability": capability or "this GPU", **row})
    return tries


def try_one(backend: str, capability: str | None) -> dict[str, Any]:
    """One try of the probe; meant for a process of its own, which it may take down."""
    try:
        return _try(backend, capability)
    except TGateError as error:
        return {"error": str(error)}


def _try(backend: str, capability: str | None) -> dict[str, Any]:
    """Build a convolution and a matrix product in fp16, run them, and compare with PyTorch in fp32."""
    import onnx_ir as ir

    flavour = FLAVOURS[backend]
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
        options = PlanOptions(capabilities=(capability,) if capability else ())
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


if __name__ == "__main__":
    print(json.dumps(try_one(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)), flush=True)
    os._exit(0)  # a runtime that was ill may not come down well
