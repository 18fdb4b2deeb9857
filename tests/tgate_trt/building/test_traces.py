"""Traces in the cache: found for what they were made from, for nothing else, and never where they are damaged."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import tgate_trt
from tgate_trt.building import traces
from tgate_trt.building.traces import Traced, find, keep
from tgate_trt.specs import ROWS, Bounds, GraphSpec, TensorSpec

SPEC = GraphSpec("vae_decoder", (TensorSpec("x", "float32", (ROWS, 4)),), (TensorSpec("y", "float32", (ROWS, 4)),), {ROWS: Bounds(1, 1, 2)})
TRACED = Traced("AutoencoderKL", {"_class_name": "AutoencoderKL", "layers_per_block": 1}, "fp32", SPEC)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tgate-trt" / "traces"


def model() -> ir.Model:
    """A graph with a parameter without data, and with data of its own."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([4]), name="weight")
    own = ir.Value(name="own", const_value=ir.tensor([2.0], name="own"))
    scaled, y = ir.node("Mul", [x, own]), ir.Value(name="y")
    graph = ir.Graph([x], [y], nodes=[scaled, ir.Node("", "Mul", [scaled.outputs[0], weight], outputs=[y])], opset_imports={"": 20})
    for value in (weight, own):
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=10)


def test_a_trace_is_found_as_it_was_kept() -> None:
    assert find(TRACED) is None
    kept, found = keep(TRACED, model()), find(TRACED)
    assert found is not None
    for one in (kept, found):
        assert ir.to_proto(one).SerializeToString(deterministic=True) == ir.to_proto(kept).SerializeToString(deterministic=True)
        assert [node.op_type for node in one.graph] == ["Mul", "Mul"]
        assert isinstance(one.graph.initializers["weight"].const_value, ir.ExternalTensor)
        own = one.graph.initializers["own"].const_value
        assert own is not None and own.numpy().tolist() == [2.0]


OTHERS: dict[str, dict[str, Any]] = {
    "class": {"kind": "AutoencoderTiny"},
    "configuration": {"config": {"_class_name": "AutoencoderKL", "layers_per_block": 2}},
    "precision": {"precision": "fp16"},
    "input": {"spec": dataclasses.replace(SPEC, inputs=(TensorSpec("x", "float32", (ROWS, 8)),))},
    "bounds": {"spec": dataclasses.replace(SPEC, dimensions={ROWS: Bounds(1, 1, 4)})},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_trace_of_something_else_is_not_found(other: str) -> None:
    keep(TRACED, model())
    assert find(dataclasses.replace(TRACED, **OTHERS[other])) is None


def test_a_trace_by_other_packages_or_other_sources_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(TRACED, model())
    with monkeypatch.context() as patch:
        patch.setattr(traces, "toolchain", lambda: {"torch": "0"})
        assert find(TRACED) is None
    with monkeypatch.context() as patch:
        patch.setattr(traces, "_MODULES", ("eager",))
        assert find(TRACED) is None
    assert find(TRACED) is not None


def test_what_files_leave_out_or_note_makes_no_other_trace() -> None:
    bare = dataclasses.replace(TRACED, config={"_class_name": "AutoencoderKL", "layers_per_block": 2})
    noted = {**bare.config, "_diffusers_version": "0.30.0", "_name_or_path": "somewhere", "norm_num_groups": 32}
    assert bare.key == dataclasses.replace(bare, config=noted).key
    assert bare.key != dataclasses.replace(bare, config=noted | {"norm_num_groups": 16}).key
    text = dataclasses.replace(TRACED, kind="CLIPTextModel", config={"hidden_size": 32})
    assert text.key == dataclasses.replace(text, config={"hidden_size": 32, "transformers_version": "4.0", "vocab_size": 49408}).key
    assert text.key != dataclasses.replace(text, config={"hidden_size": 64}).key


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_trace_is_not_used(damage: Any, cache: Path) -> None:
    keep(TRACED, model())
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert find(TRACED) is None
    keep(TRACED, model())
    assert find(TRACED) is not None


def test_a_cache_that_cannot_be_written_stops_nothing(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    assert keep(TRACED, model()).graph.initializers["own"].const_value is not None
    assert find(TRACED) is None


def test_those_go_that_were_used_longest_ago(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST", 2)
    first, second, third = (
        dataclasses.replace(TRACED, config={"_class_name": "AutoencoderKL", "layers_per_block": layers}) for layers in range(3)
    )
    for age, traced in ((200, first), (100, second)):
        keep(traced, model())
        os.utime(cache / f"{traced.key}.trace", (age, age))
    assert find(first) is not None  # now it is the one that was used last
    keep(third, model())
    assert [find(traced) is not None for traced in (first, second, third)] == [True, False, True]


def test_another_checkpoint_of_an_architecture_is_not_traced_again(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Its bundle has its own weights, and the trace is equal, in every byte, to one that is made anew."""
    from diffusers import DiffusionPipeline

    other = DiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    torch.nn.init.normal_(other.unet.conv_in.weight)
    exports: list[Any] = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: exports.append(1) or export(*arguments, **options))
    options: Any = {"graphs": ("fidelity",), "verify": False}
    first = tgate_trt.build(tiny_sd, tmp_path / "first", **options)
    assert len(exports) == 3 == len(list(cache.iterdir())), "UNet, text encoder and VAE"
    second = tgate_trt.build(other, tmp_path / "second", **options)
    assert len(exports) == 3, "there is one trace of each"
    anew = tgate_trt.build(tiny_sd, tmp_path / "anew", force=True, **options)
    assert len(exports) == 6
    files = {bundle.folder.name: {name: file.sha256 for name, file in bundle.manifest.files.items()} for bundle in (first, second, anew)}
    assert files["first"] == files["anew"]
    assert files["first"]["trace.onnx"] == files["second"]["trace.onnx"]
    assert files["first"]["weights.safetensors"] != files["second"]["weights.safetensors"]
