"""Whole pictures of the demo model by TensorRT's engines on the stand-in: those that ONNX Runtime draws."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import graph_file
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt import TensorRTEngine
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.export.weights_as_inputs import turn_weights_into_inputs
from tgate_trt.gate.denoiser import GatedDenoiser

from .conftest import StandIn
from .stand_in.tensorrt import write_plan

GRAPHS = ("planning", "fidelity", "vanilla")
GATES = ("4,sp=2,fi=2,warm=1", "3,deep=2")
CAPTION = "a large red circle at the top right on a white background"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the demo model, one or two images a run. Read only."""
    folder = tmp_path_factory.mktemp("bundles") / "shapes"
    return tgate_trt.build("shapes", folder, graphs=GRAPHS, gates=GATES, batch_size="1:1:2", components=False, verify=False)


def engines_of(
    bundle: Bundle, stand_in: StandIn, folder: Path, weights: SharedWeights | None, graphs: Iterable[str] = GRAPHS, **plan: Any
) -> dict[str, TensorRTEngine]:
    """An engine of each graph, which hold their weights or take them as inputs."""
    made = {}
    for name in graphs:
        graph, spec = bundle.folder / graph_file(name), bundle.graph(name)
        if weights is not None:
            model = ir.load(graph)
            turn_weights_into_inputs(model)
            ir.external_data.load_to_model(model)
            graph = folder / f"{name}.shared.onnx"
            ir.save(model, graph)
        write_plan(folder / f"{name}.plan", graph, spec, user_allocation=True, **plan)
        made[name] = TensorRTEngine(folder / f"{name}.plan", spec, stand_in.flavour, stand_in.arena, weights=weights)
    return made


def draw(pipeline: Any, images: int, steps: int = 6) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures: Tensor = pipeline([CAPTION] * images, num_inference_steps=steps, generator=generator, output_type="pt").images
    return pictures


@pytest.mark.parametrize("weights", ["baked", "shared"])
def test_gated_pictures_are_those_of_onnx_runtime(weights: str, bundle: Bundle, stand_in: StandIn, tmp_path: Path) -> None:
    """Batches and gates in turn, so that graphs are captured, replayed, and met again."""
    pipeline: Any = tgate_trt.load(bundle, backend="onnxruntime", threads=1)
    theirs, replaces = pipeline.unet, pipeline.unet.replaces
    held = SharedWeights([bundle.folder / WEIGHTS_FILE], torch.device("cpu")) if weights == "shared" else None
    engines = engines_of(bundle, stand_in, tmp_path, held)
    if held is None:
        engines.pop("vanilla").close()
    ours = GatedDenoiser(pipeline, replaces, engines, gate_step=3)
    for images, gate_step in ((1, 3), (1, 3), (2, 4), (1, 3), (1, "none")):
        drawn = []
        for denoiser in (theirs, ours):
            pipeline.unet, denoiser.gate_step = denoiser, gate_step
            drawn.append(draw(pipeline, images))
        torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    assert (stand_in.cuda.replayed > 0) == (not stand_in.flavour.captures_graphs)
    assert all(context.runs for context in stand_in.contexts)


def test_taps_that_are_kept_and_reused_stay_where_they_are(bundle: Bundle, stand_in: StandIn, tmp_path: Path) -> None:
    """Self-attention reuse, DeepCache and forecasts: an engine writes what another one reads, under captured graphs."""
    pipeline: Any = tgate_trt.load(bundle, backend="onnxruntime", threads=1)
    theirs, replaces = pipeline.unet, pipeline.unet.replaces
    held = SharedWeights([bundle.folder / WEIGHTS_FILE], torch.device("cpu"))
    ours = GatedDenoiser(pipeline, replaces, engines_of(bundle, stand_in, tmp_path, held, bundle.manifest.graphs), gate="none")
    for gate in (*GATES, "2,after=fading,forecast=2", *GATES):
        drawn = []
        for denoiser in (theirs, ours):
            pipeline.unet, denoiser.gate = denoiser, gate
            drawn.append(draw(pipeline, 1, steps=8))
        torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


def test_low_memory_holds_one_engine_at_a_time(bundle: Bundle, stand_in: StandIn, tmp_path: Path) -> None:
    pipeline: Any = tgate_trt.load(bundle, backend="onnxruntime", threads=1, gate_step=3)
    expected = draw(pipeline, 1)
    engines = engines_of(bundle, stand_in, tmp_path, None)
    pipeline.unet = GatedDenoiser(pipeline, pipeline.unet.replaces, engines, gate_step=3, low_memory=True)
    for _ in range(3):
        torch.testing.assert_close(draw(pipeline, 1), expected, rtol=0, atol=1e-4)
        assert len(stand_in.contexts) == 1


def test_a_lora_comes_and_goes(bundle: Bundle, stand_in: StandIn, tmp_path: Path) -> None:
    """Other weights in the place of the shared ones, under captured graphs: A → B → A."""
    pipeline: Any = tgate_trt.load(bundle, backend="onnxruntime", threads=1, gate_step=3)
    theirs, replaces = pipeline.unet, pipeline.unet.replaces
    held = SharedWeights([bundle.folder / WEIGHTS_FILE], torch.device("cpu"))
    ours = GatedDenoiser(pipeline, replaces, engines_of(bundle, stand_in, tmp_path, held), gate_step=3)
    weights = load_file(bundle.folder / WEIGHTS_FILE)
    names = [name for name in weights if name.endswith("attn1.to_q.weight")][:2]
    loras = [{name: weights[name] * scale for name in names} for scale in (1.5, 0.2)]
    pictures = []
    for changed in (loras[0], loras[1], loras[0], {}):
        drawn = []
        for denoiser in (theirs, ours):
            pipeline.unet = denoiser
            for engine in denoiser.engines.values():
                engine.replace_weights(changed)
            drawn.append(draw(pipeline, 1))
        torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
        pictures.append(drawn[1])
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
