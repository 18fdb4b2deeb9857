"""A trace keeps the model's parameters, and each graph cut from it equals the eager model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from tgate_trt.eager import run_recipe, tapped_modules, torch_dtype
from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
from tgate_trt.errors import VerificationError
from tgate_trt.export import weights
from tgate_trt.export.cut import cut, spec_of
from tgate_trt.export.fuse import fuse_cache_reuse
from tgate_trt.export.trace import trace
from tgate_trt.export.verify import Check, Report, random_inputs, relative_error, verify
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource
from tgate_trt.specs import MAXIMUM_ROWS, Bounds, GraphSpec
from tgate_trt.taps import GRAPHS, recipe

EVERY_GRAPH = (
    *GRAPHS,
    "keep-self",
    "reuse-self",
    "planning-keep-self",
    "fidelity-keep-self",
    "fidelity-reuse-self",
    "keep-deep3",
    *(f"reuse-deep{branch}" for branch in (0, 1, 3, 5)),
    "fidelity-keep-deep0",
    "fidelity-reuse-deep0",
    "fidelity-reuse-deep3",
)
"""Those of self-attention reuse and of DeepCache at several branches too."""

ROWS = Bounds(1, 2, MAXIMUM_ROWS)


@dataclass(frozen=True)
class Traced:
    """A trace with the files that its graphs need."""

    source: ModelSource
    precision: str
    model: ir.Model
    folder: Path

    def graph(self, name: str, *, fuse: bool = False) -> tuple[ir.Model, GraphSpec]:
        """Cut a graph and write it."""
        model = cut(self.model, recipe(name))
        if fuse:
            taken = [tensor for tensor in spec_of(model, name, ROWS).cache_inputs if "cross_attention" in tensor.name]
            assert fuse_cache_reuse(model) == len(taken), "the norm after self-attention is that of cross-attention, which is not there"
        weights.attach(model, self.folder, [self.folder / weights.WEIGHTS_FILE])
        ir.save(model, self.folder / f"{name}.onnx")
        return model, spec_of(model, name, ROWS)

    def engine(self, name: str, *, fuse: bool = False) -> OnnxRuntimeEngine:
        """An engine of a graph that was written."""
        return OnnxRuntimeEngine(self.folder / f"{name}.onnx", self.graph(name, fuse=fuse)[1], device=torch.device("cpu"), threads=1)


@pytest.fixture(
    scope="module", params=[("tiny_sd", "fp32"), ("tiny_sd", "fp16"), ("tiny_sdxl", "fp32"), ("tiny_sdxl", "fp16")], ids="-".join
)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Each tiny architecture, traced in each precision."""
    pipeline, precision = request.param
    source = resolve(request.getfixturevalue(pipeline))
    dtype = torch_dtype(precision)
    folder = tmp_path_factory.mktemp(f"{pipeline}-{precision}")
    weights.write(folder / weights.WEIGHTS_FILE, source.tensor_shapes(), source.tensors(dtype), precision)
    model = trace(torch.nn.Module.to(source.denoiser_on_meta(), dtype), source.signature(source.height, source.width, precision))
    return Traced(source, precision, model, folder)


def parameters(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers that lie in the weights file."""
    return {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and value.shape is not None
    }


def test_parameters_keep_names_shapes_and_number(traced: Traced) -> None:
    state = traced.source.load_denoiser(torch.float32).state_dict()
    assert parameters(traced.graph("vanilla")[0]) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_constants_beside_the_weights_are_small(traced: Traced) -> None:
    for name in GRAPHS:
        model, _ = traced.graph(name)
        inline = [v.const_value for v in model.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
        assert all(tensor is not None and tensor.nbytes < 4096 for tensor in inline)


def test_fidelity_holds_no_cross_attention_and_no_text(traced: Traced) -> None:
    model, spec = traced.graph("fidelity")
    assert not [name for name in parameters(model) if ".transformer_blocks." in name and (".attn2." in name or ".norm2." in name)]
    assert "encoder_hidden_states" not in {tensor.name for tensor in spec.inputs}
    everything = traced.source.tensor_shapes()
    dead = {name for name in everything if ".transformer_blocks." in name and (".attn2." in name or ".norm2." in name)}
    assert set(parameters(model)) == set(everything) - dead
    assert sum(math.prod(shape) for shape in parameters(model).values()) == sum(
        math.prod(everything[name]) for name in set(everything) - dead
    )


def test_planning_gives_one_cache_a_cross_attention(traced: Traced) -> None:
    _, planning = traced.graph("planning")
    _, fidelity = traced.graph("fidelity")
    taps = {f"cache.{tap}" for tap, _ in tapped_modules(traced.source.denoiser_on_meta()) if tap.startswith("cross_attention.")}
    assert {tensor.name for tensor in planning.cache_outputs} == {tensor.name for tensor in fidelity.cache_inputs} == taps
    assert taps


@pytest.mark.parametrize(("graph", "fuse"), [*((graph, False) for graph in EVERY_GRAPH), ("fidelity", True), ("fidelity-reuse-self", True)])
def test_every_graph_equals_eager(traced: Traced, graph: str, fuse: bool) -> None:
    if graph not in GRAPHS and traced.precision == "fp16":
        pytest.skip("in fp32 it takes less time, and shows more")
    report = verify(
        lambda: traced.source.load_denoiser(torch.float32),
        lambda: traced.engine(graph, fuse=fuse).run,
        traced.graph(graph)[1],
        lambda denoiser, inputs: run_recipe(denoiser, recipe(graph), inputs),
        traced.source.signature(traced.source.height, traced.source.width, traced.precision),
        rows=(1, 2, 5),
        precision=traced.precision,
    )
    report.raise_if_wrong()
    assert [check.rows for check in report.checks] == [1, 2, 5]


def test_a_wrong_weight_fails_verification(traced: Traced) -> None:
    def with_one_weight_changed() -> torch.nn.Module:
        denoiser = traced.source.load_denoiser(torch.float32)
        denoiser.get_parameter("conv_out.weight").mul_(1.5)
        return denoiser

    report = verify(
        with_one_weight_changed,
        lambda: traced.engine("fidelity").run,
        traced.graph("fidelity")[1],
        lambda denoiser, inputs: run_recipe(denoiser, recipe("fidelity"), inputs),
        traced.source.signature(traced.source.height, traced.source.width, traced.precision),
        rows=(2,),
        precision=traced.precision,
    )
    with pytest.raises(VerificationError, match="fidelity graph differs from eager PyTorch"):
        report.raise_if_wrong()


def test_the_cache_reaches_the_prediction(traced: Traced) -> None:
    _, spec = traced.graph("fidelity")
    engine = traced.engine("fidelity")
    inputs = random_inputs(spec.inputs, 2, torch.Generator().manual_seed(0))
    predictions = []
    for scale in (1.0, 1.1):
        changed = {name: tensor * scale if name.startswith("cache.") else tensor for name, tensor in inputs.items()}
        output = torch.empty(spec.outputs[0].concrete(batch=2), dtype=torch_dtype(spec.outputs[0].dtype))
        engine.run(changed, {"noise_pred": output})
        predictions.append(output)
    assert relative_error(predictions[1], predictions[0]) > 1e-2


def test_eager_taken_in_equals_given_out(traced: Traced) -> None:
    denoiser = traced.source.load_denoiser(torch.float32)
    inputs = random_inputs(traced.source.signature(traced.source.height, traced.source.width, "fp32"), 2, torch.Generator().manual_seed(0))
    planned = run_recipe(denoiser, GRAPHS["planning"], inputs)
    caches = {name: tensor for name, tensor in planned.items() if name.startswith("cache.")}
    refined = run_recipe(denoiser, GRAPHS["fidelity"], {**inputs, **caches})
    assert torch.equal(refined["noise_pred"], planned["noise_pred"])


def test_not_a_number_is_the_worst_error() -> None:
    report = Report("planning", 1e-4, (Check(1, 1e-6, "noise_pred"), Check(2, math.nan, "noise_pred")))
    with pytest.raises(VerificationError, match="nan"):
        report.raise_if_wrong()
