"""Planning steps before the last run an engine that gives out no cross-attention, where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.running.loading import EngineLoader, load_engine

CPU = torch.device("cpu")
STEPS = 5


class Counted:
    """An engine that counts its runs."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.runs += 1
        self._engine.run(inputs, outputs)


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        ["a red circle"], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    return latents


def gated(bundle: Bundle, gate_step: int | str, vanilla: bool) -> tuple[Any, list[Counted]]:
    pipeline = tgate_trt.load(bundle, threads=1)
    engines = [Counted(load_engine(bundle, graph, backend="onnxruntime", threads=1)) for graph in ("planning", "fidelity", "vanilla")]
    used: dict[str, Any] = {engine.spec.name: engine for engine in engines[: 2 + vanilla]}
    pipeline.unet = GatedDenoiser(pipeline, pipeline.unet.replaces, used, gate_step=gate_step)
    return pipeline, engines


@pytest.mark.parametrize(("gate_step", "runs"), [(1, (1, 4, 0)), (3, (1, 2, 2)), (5, (0, 0, 5)), ("none", (0, 0, 5))])
def test_only_the_last_planning_step_gives_out_cross_attention(gate_step: int | str, runs: tuple[int, ...], sd_bundle: Bundle) -> None:
    pipeline, engines = gated(sd_bundle, gate_step, vanilla=True)
    drawn = draw(pipeline)
    assert tuple(engine.runs for engine in engines) == runs
    torch.testing.assert_close(drawn, draw(gated(sd_bundle, gate_step, vanilla=False)[0]), rtol=1e-4, atol=1e-4)


def test_the_vanilla_engine_gets_loras_and_is_closed(sd_bundle: Bundle) -> None:
    pipeline, engines = gated(sd_bundle, 3, vanilla=True)
    assert list(pipeline.unet.engines) == ["planning", "fidelity", "vanilla"]
    pipeline.unet.close()
    with pytest.raises(tgate_trt.TGateError, match="closed"):
        engines[2].run({}, {})


@pytest.fixture(scope="module")
def pytorch_bundle(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of PyTorch's engines, without a vanilla graph. Read only."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny-sd"
    return tgate_trt.build(tiny_sd, folder, backend="pytorch", precision="fp32", verify=False, components=False)


def test_pytorch_has_one_on_the_same_weights(pytorch_bundle: Bundle) -> None:
    assert "vanilla" not in pytorch_bundle.manifest.graphs
    pipeline = tgate_trt.load(pytorch_bundle, gate_step=3)
    planning, vanilla = (pipeline.unet.engines[graph] for graph in ("planning", "vanilla"))
    state = planning._denoiser.state_dict()
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in vanilla._denoiser.state_dict().items())
    drawn = draw(pipeline)
    without = {graph: engine for graph, engine in pipeline.unet.engines.items() if graph != "vanilla"}
    pipeline.unet = GatedDenoiser(pipeline, pipeline.unet.replaces, without, gate_step=3)
    assert torch.equal(drawn, draw(pipeline))


def test_onnx_runtime_has_none_for_it_would_hold_the_weights_once_more(sd_bundle: Bundle) -> None:
    assert EngineLoader(sd_bundle, "onnxruntime", CPU).load_vanilla() is None
