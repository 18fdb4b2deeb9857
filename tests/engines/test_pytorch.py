"""The PyTorch engine: its cuts equal the eager model's, in the caller's memory, on the CPU here and on a GPU under ``-m gpu``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tgate_trt.eager import run_recipe
from tgate_trt.engines.pytorch import PyTorchEngine, PyTorchOptions, _Cut
from tgate_trt.errors import BundleError, GateError
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.kernels import cached_residual_layer_norm as kernel
from tgate_trt.models.resolve import resolve
from tgate_trt.specs import CACHE_PREFIX, ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import CROSS_ATTENTION, GRAPHS, Recipe, deep_features, kind_of, recipe

CPU = torch.device("cpu")
TOLERANCE = 1e-5
BY_DEFAULT = PyTorchOptions()


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A pipeline's folder."""
    path: Path = request.getfixturevalue(request.param)
    return path


def architecture(folder: Path) -> nn.Module:
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        denoiser: nn.Module = diffusers.UNet2DConditionModel.from_config(config)
    return denoiser


def weights_of(folder: Path, device: torch.device = CPU) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors", device=str(device))


def eager(folder: Path) -> nn.Module:
    denoiser: nn.Module = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    return denoiser.eval()


def signature(folder: Path) -> tuple[TensorSpec, ...]:
    return resolve(folder).signature(64, 64, "fp32")


def spec_of(folder: Path, graph: str) -> GraphSpec:
    """What a graph of the pipeline's UNet takes and gives, told by running the eager model."""
    whole, cut = signature(folder), recipe(graph)
    with torch.no_grad():
        given = Recipe(gives_out=(*cut.takes_in, *cut.gives_out))
        every = run_recipe(eager(folder), given, random_inputs(whole, 1, torch.Generator().manual_seed(0)))
    specs = {name: TensorSpec(name, "float32", (ROWS, *value.shape[1:])) for name, value in every.items()}
    noise = specs.pop("noise_pred")

    def caches(kinds: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        return tuple(spec for name, spec in specs.items() if kind_of(name.removeprefix("cache.")) in kinds)

    inputs = tuple(tensor for tensor in whole if not (CROSS_ATTENTION in cut.takes_in and tensor.name == "encoder_hidden_states"))
    return GraphSpec(graph, inputs + caches(cut.takes_in), (noise, *caches(cut.gives_out)), {ROWS: Bounds(1, 2, 31)})


def engine_of(folder: Path, graph: str, options: PyTorchOptions = BY_DEFAULT, device: torch.device = CPU) -> PyTorchEngine:
    return PyTorchEngine(architecture(folder), weights_of(folder, device), spec_of(folder, graph), recipe(graph), device, options)


def case(folder: Path, spec: GraphSpec, rows: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random inputs of a graph, and all that the eager model needs beside them."""
    every = {tensor.name: tensor for tensor in (*signature(folder), *spec.inputs)}
    values = random_inputs(tuple(every.values()), rows, torch.Generator().manual_seed(seed))
    return {tensor.name: values[tensor.name] for tensor in spec.inputs}, values


def poisoned(spec: GraphSpec, rows: int, device: torch.device = CPU) -> dict[str, Tensor]:
    return {tensor.name: torch.full(tensor.concrete(**{ROWS: rows}), torch.nan, device=device) for tensor in spec.outputs}


def assert_equal(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert relative_error(output.cpu(), expected[name]) <= tolerance, name


FURTHER = (
    "keep-self",
    "reuse-self",
    "planning-keep-self",
    "fidelity-reuse-self",
    *(graph for branch in (0, 2, 3, 5) for graph in (f"keep-deep{branch}", f"reuse-deep{branch}", f"fidelity-reuse-deep{branch}")),
)
"""Graphs of self-attention reuse and of DeepCache."""


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("graph", [*GRAPHS, *FURTHER])
def test_a_cut_equals_the_eager_model(folder: Path, graph: str, fuse: bool) -> None:
    engine = engine_of(folder, graph, PyTorchOptions(fuse_cache_reuse=fuse))
    denoiser = eager(folder)
    for rows in (2, 1, 3):
        inputs, everything = case(folder, engine.spec, rows, seed=rows)
        outputs = poisoned(engine.spec, rows)
        addresses = {name: tensor.data_ptr() for name, tensor in outputs.items()}
        engine.run(inputs, outputs)
        assert_equal(outputs, run_recipe(denoiser, recipe(graph), everything))
        assert {name: tensor.data_ptr() for name, tensor in outputs.items()} == addresses


@pytest.mark.parametrize("graph", ["fidelity", "reuse-deep0", "reuse-deep3", "keep-deep0"])
def test_weights_are_exchanged_in_what_a_cut_leaves(folder: Path, graph: str) -> None:
    """Layers of a UNet's upper part have other places in it than in the whole; another weight reaches its own."""
    engine, denoiser = engine_of(folder, graph), eager(folder)
    original = weights_of(folder)
    inputs, everything = case(folder, engine.spec, 2)
    changed = {
        name: tensor * 1.5
        for name, tensor in original.items()
        if name.startswith("up_blocks.") and name.endswith(("conv1.weight", "to_q.weight"))
    }
    for weights in (changed, {}):
        engine.replace_weights(weights)
        denoiser.load_state_dict({**original, **weights})
        outputs = poisoned(engine.spec, 2)
        engine.run(inputs, outputs)
        with torch.no_grad():
            assert_equal(outputs, run_recipe(denoiser, recipe(graph), everything))


def test_every_block_takes_its_cache_through_the_fused_op(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder, "fidelity")
    calls = []
    fused = kernel.reference
    monkeypatch.setattr(kernel, "reference", lambda *arguments: calls.append(1) or fused(*arguments))
    inputs, _ = case(folder, engine.spec, 1)
    engine.run(inputs, poisoned(engine.spec, 1))
    assert len(calls) == len(engine.spec.cache_inputs)


def test_a_cached_cross_attention_is_not_computed(folder: Path) -> None:
    engine = engine_of(folder, "fidelity")
    run = []
    for path, module in engine._denoiser.named_modules():
        if path.endswith("attn2.to_q"):
            module.register_forward_hook(lambda *_: run.append(1))
    inputs, _ = case(folder, engine.spec, 1)
    engine.run(inputs, poisoned(engine.spec, 1))
    assert not run
    assert "encoder_hidden_states" not in inputs


def test_engines_share_one_copy_of_the_weights(folder: Path) -> None:
    weights = weights_of(folder)
    engines = [
        PyTorchEngine(architecture(folder), weights, spec_of(folder, graph), recipe(graph), CPU) for graph in ("planning", "fidelity")
    ]
    places = [{name: tensor.data_ptr() for name, tensor in engine._denoiser.state_dict().items()} for engine in engines]
    assert places[0] == places[1] == {name: tensor.data_ptr() for name, tensor in weights.items()}


def test_other_weights_and_back(folder: Path) -> None:
    engine = engine_of(folder, "planning")
    inputs, everything = case(folder, engine.spec, 2)
    before, between, after = (poisoned(engine.spec, 2) for _ in range(3))
    engine.run(inputs, before)
    name = "conv_in.weight"
    engine.replace_weights({name: weights_of(folder)[name] * 2, "of.another.component": torch.zeros(1)})
    engine.run(inputs, between)
    changed = eager(folder)
    changed.get_parameter(name).data *= 2
    assert_equal(between, run_recipe(changed, recipe("planning"), everything))
    engine.replace_weights({})
    engine.run(inputs, after)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_threads_are_the_engines_own(folder: Path) -> None:
    engine = engine_of(folder, "vanilla", PyTorchOptions(threads=1))
    seen = []
    engine._denoiser.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine.run(case(folder, engine.spec, 1)[0], poisoned(engine.spec, 1))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_told(folder: Path) -> None:
    engine = engine_of(folder, "fidelity")
    inputs, _ = case(folder, engine.spec, 1)
    outputs = poisoned(engine.spec, 1)
    with pytest.raises(GateError, match="was not given 'sample'"):
        engine.run({name: tensor for name, tensor in inputs.items() if name != "sample"}, outputs)
    with pytest.raises(GateError, match=r"'noise_pred' must be a contiguous float32 tensor on cpu, got torch\.float16"):
        engine.run(inputs, {"noise_pred": outputs["noise_pred"].half()})
    engine.close()
    with pytest.raises(GateError, match="has been closed"):
        engine.run(inputs, outputs)


def test_weights_of_another_model_are_told(folder: Path) -> None:
    weights = weights_of(folder)
    del weights["conv_in.weight"]
    with pytest.raises(BundleError, match=r"the weights are not those of UNet2DConditionModel: .*conv_in\.weight"):
        PyTorchEngine(architecture(folder), weights, spec_of(folder, "vanilla"), recipe("vanilla"), CPU)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_transformer_is_cut_too(compiled: bool) -> None:
    """PixArt's blocks are none that take the fused op: the cache stands in the place of the attention module."""

    def make() -> nn.Module:
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
            interpolation_scale=1,
            use_additional_conditions=False,
        ).eval()

    torch.manual_seed(0)
    denoiser = make()
    with torch.device("meta"):
        on_meta = make()
    for name, buffer in denoiser.named_buffers():  # of the positions, which are no part of the state
        on_meta.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    tap = f"{CACHE_PREFIX}cross_attention.transformer_blocks.0"
    spec = GraphSpec(
        "fidelity",
        (
            TensorSpec("sample", "float32", (ROWS, 4, 8, 8)),
            TensorSpec("timestep", "float32", (ROWS,)),
            TensorSpec("encoder_hidden_states", "float32", (ROWS, 5, 16)),
            TensorSpec(tap, "float32", (ROWS, 16, 16)),
        ),
        (TensorSpec("noise_pred", "float32", (ROWS, 8, 8, 8)),),
        {ROWS: Bounds(1, 2, 31)},
    )
    engine = PyTorchEngine(on_meta, denoiser.state_dict(), spec, recipe("fidelity"), CPU, PyTorchOptions(compile=compiled))
    inputs = random_inputs(spec.inputs, 2, torch.Generator().manual_seed(0))
    outputs = poisoned(spec, 2)
    engine.run(inputs, outputs)
    assert_equal(outputs, run_recipe(denoiser, recipe("fidelity"), inputs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["CUDA graphs", "launches"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_on_a_gpu_it_equals_the_eager_model(folder: Path, graph: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls, so that a CUDA graph is captured and replayed, with new numbers at the same and at other addresses."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", False)
    device = torch.device("cuda")
    engine = engine_of(folder, graph, PyTorchOptions(cuda_graphs=cuda_graphs), device)
    denoiser = eager(folder)
    for rows in (2, 1):
        outputs, kept = poisoned(engine.spec, rows, device), {}
        for seed in range(4):
            inputs, everything = case(folder, engine.spec, rows, seed)
            for name, tensor in inputs.items():
                if name.startswith(CACHE_PREFIX):
                    kept.setdefault(name, torch.empty_like(tensor, device=device)).copy_(tensor)
            engine.run({name: kept.get(name, tensor.to(device)) for name, tensor in inputs.items()}, outputs)
            assert_equal(outputs, run_recipe(denoiser, recipe(graph), everything), 1e-4)
            for tensor in outputs.values():
                tensor.fill_(torch.nan)
    if cuda_graphs:
        assert engine._graphs, "nothing was captured"


@pytest.mark.parametrize("branch", range(12))
def test_every_branch_of_a_larger_unet_can_be_cut(branch: int) -> None:
    """The tiny ones have two blocks; where there are four, the upper part has fewer paths than the whole."""
    unet: Any = resolve("sd15", random_weights=True).denoiser_on_meta()
    up = len(unet.up_blocks)
    _Cut(unet, Recipe(takes_in=(deep_features(branch),)), fuse_cache_reuse=False, fuse_modules=False)
    assert len(unet.down_blocks) == len(unet.up_blocks) == branch // 3 + 1 <= up
    assert len(unet.up_blocks[0].resnets) == branch % 3 + 1
