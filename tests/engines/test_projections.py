"""Weights arranged for a GPU: the same values on the same names, fewer products, and the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

from tgate_trt.eager import attention_modules, run_recipe
from tgate_trt.engines.projections import arranged, is_arranged
from tgate_trt.engines.pytorch import PyTorchEngine
from tgate_trt.export.verify import relative_error
from tgate_trt.taps import recipe

from .test_pytorch import CPU, architecture, case, eager, poisoned, spec_of, weights_of


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def engine_of(folder: Path, graph: str, weights: dict[str, Tensor]) -> PyTorchEngine:
    return PyTorchEngine(architecture(folder), weights, spec_of(folder, graph), recipe(graph), CPU)


def processors(engine: PyTorchEngine) -> set[type]:
    return {type(module.processor) for _, module in attention_modules(engine._denoiser)}


def test_values_names_and_shapes_stay(folder: Path) -> None:
    weights = weights_of(folder)
    other = arranged(weights)
    assert list(other) == list(weights)
    assert all(torch.equal(other[name], value) for name, value in weights.items())
    assert is_arranged(other)
    assert not is_arranged(weights)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    queries, keys = other[f"{layer}.to_q.weight"], other[f"{layer}.to_k.weight"]
    assert keys.data_ptr() == queries.data_ptr() + queries.nbytes


@pytest.mark.parametrize("graph", ["vanilla", "planning", "fidelity"])
def test_arranged_weights_compute_the_same(folder: Path, graph: str) -> None:
    engine = engine_of(folder, graph, arranged(weights_of(folder)))
    assert FusedAttnProcessor2_0 in processors(engine)
    inputs, everything = case(folder, engine.spec, 2)
    outputs = poisoned(engine.spec, 2)
    engine.run(inputs, outputs)
    expected = run_recipe(eager(folder), recipe(graph), everything)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert relative_error(output, expected[name]) <= 1e-5, name


def test_weights_that_lie_apart_are_not_fused(folder: Path) -> None:
    assert processors(engine_of(folder, "vanilla", weights_of(folder))) == {AttnProcessor2_0}


def test_engines_of_arranged_weights_share_them(folder: Path) -> None:
    weights = arranged(weights_of(folder))
    places = []
    for graph in ("planning", "fidelity"):
        state: dict[str, Any] = engine_of(folder, graph, weights)._denoiser.state_dict()
        places.append({name: tensor.data_ptr() for name, tensor in state.items()})
    assert places[0] == places[1] == {name: tensor.data_ptr() for name, tensor in weights.items()}


@pytest.mark.parametrize("layers", [("to_q",), ("to_q", "to_k", "to_v")], ids=["one of three", "all three"])
def test_replaced_projections_are_used_and_taken_back(folder: Path, layers: tuple[str, ...]) -> None:
    engine = engine_of(folder, "vanilla", arranged(weights_of(folder)))
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    names = [f"{path}.{layer}.weight" for layer in layers]
    inputs, everything = case(folder, engine.spec, 2)
    before, between, after = (poisoned(engine.spec, 2) for _ in range(3))
    engine.run(inputs, before)
    engine.replace_weights({name: weights_of(folder)[name] * 2 for name in names})
    engine.run(inputs, between)
    changed = eager(folder)
    for name in names:
        changed.get_parameter(name).data *= 2
    assert relative_error(between["noise_pred"], run_recipe(changed, recipe("vanilla"), everything)["noise_pred"]) <= 1e-5
    assert not torch.equal(between["noise_pred"], before["noise_pred"])
    engine.replace_weights({})
    engine.run(inputs, after)
    assert torch.equal(after["noise_pred"], before["noise_pred"])
