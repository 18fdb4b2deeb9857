"""Graphs of text encoders and VAE decoders: traced at any size, their weights in the files of the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tgate_trt.building.graphs import write_component_graph
from tgate_trt.bundle.components import Component, components_of
from tgate_trt.bundle.manifest import PIPELINE, BuiltFor
from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
from tgate_trt.errors import BuildError
from tgate_trt.export.components import run_component, trace_component
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.specs import ROWS, Bounds, GraphSpec, TensorSpec


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """What becomes a bundle: a folder with `tiny_sd`'s components, to change."""
    shutil.copytree(tiny_sd, tmp_path / PIPELINE)
    return tmp_path


def built(side: int, images: int) -> tuple[BuiltFor, int, GraphSpec]:
    """What a component's spec is made from: pictures of one size."""
    size, latent = Bounds(side, side, side), side // 8
    signature = GraphSpec("denoiser", (TensorSpec("sample", "float32", (ROWS, 4, latent, latent)),), ())
    return BuiltFor("fp32", size, size, Bounds(1, 1, images), True, Bounds(1, 77, 231)), 77, signature


def component_of(folder: Path, graph: str) -> tuple[Component, GraphSpec]:
    component = components_of(folder / PIPELINE)[graph]
    return component, component.spec(*built(64, 2))


def difference(folder: Path, graph: str) -> float:
    """How far a graph on disk is from the eager component on disk, at 2 rows."""
    component, spec = component_of(folder, graph)
    inputs = random_inputs(spec.inputs, 2, torch.Generator().manual_seed(0), vocabulary=600)
    outputs = {output.name: torch.full(output.concrete(**{ROWS: 2}), torch.nan) for output in spec.outputs}
    OnnxRuntimeEngine(folder / f"{graph}.onnx", spec, device=torch.device("cpu"), threads=1).run(inputs, outputs)
    expected = run_component(component.wrap(component.load(folder / PIPELINE, torch.float32)), inputs)
    return max(relative_error(outputs[name], expected[name]) for name in expected)


def test_a_large_picture_is_traced(folder: Path) -> None:
    """From 2³¹ numbers in a feature map on, diffusers takes another path: here from 9 pictures, in SDXL at 1024² from 17."""
    component = components_of(folder / PIPELINE)["vae_decoder"]
    spec = component.spec(*built(8192, 8))
    model = trace_component(component.wrap(component.on_meta(torch.float32)), spec.inputs, 8)
    assert [str(value.shape) for value in model.graph.outputs] == [f"[{ROWS},3,8192,8192]"]


def test_weights_under_names_of_before_2023(folder: Path) -> None:
    """Published VAEs of SD 1.5 name the attention's layers otherwise than diffusers does now."""
    path = folder / PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        head, attention, layer = name.partition(".attentions.0.")
        layer, dot, kind = layer.rpartition(".")
        tensors[head + attention + old.get(layer, layer) + dot + kind if attention else name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    component, spec = component_of(folder, "vae_decoder")
    write_component_graph(component, folder, spec)
    assert "decoder.mid_block.attentions.0.query.weight" in ir.load(folder / "vae_decoder.onnx").graph.initializers
    assert difference(folder, "vae_decoder") < 1e-5


def test_weights_in_several_files(folder: Path) -> None:
    path = folder / PIPELINE / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    shards = {"model-00001-of-00002.safetensors": list(tensors)[::2], "model-00002-of-00002.safetensors": list(tensors)[1::2]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, path.with_name(file), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    component, spec = component_of(folder, "text_encoder")
    write_component_graph(component, folder, spec)
    parameters = [value.const_value for value in ir.load(folder / "text_encoder.onnx").graph.initializers.values()]
    locations = {tensor.location for tensor in parameters if isinstance(tensor, ir.ExternalTensor)}
    assert locations == {f"{PIPELINE}/text_encoder/{file}" for file in shards}
    assert difference(folder, "text_encoder") < 1e-5


def test_weights_that_do_not_fit(folder: Path) -> None:
    component, spec = component_of(folder, "text_encoder")
    path = folder / PIPELINE / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "final_layer_norm" not in name}, path)
    with pytest.raises(BuildError, match=r"do not hold '\S*final_layer_norm\.\w+' with shape"):
        write_component_graph(component, folder, spec)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    with pytest.raises(BuildError, match="in another dtype than FLOAT"):
        write_component_graph(component, folder, spec)
