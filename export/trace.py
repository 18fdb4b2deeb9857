"""Trace a denoiser once, with every tap as a named node.

The model's parameters are fake tensors during the trace, so it needs no memory for weights. They are inputs of the graph while it is
simplified, so no pass can rename, fold, transpose or merge one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_trt.eager import forward, tapped, torch_dtype
from tgate_trt.errors import BuildError
from tgate_trt.export.passes import NoSqueezePass, PromoteConcatPass, RowsFromSamplePass
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds, TensorSpec, names_in

OPSET = 20
"""The newest opset from which all our backends build. For an older one the exporter would convert the graph and inline functions."""

TAP_DOMAIN, TAP_OP = "tgate", "Tap"
"""The marker node of a tap: one input, one output of the same value, and the string attribute ``name``."""


class _ByPosition(nn.Module):
    """The denoiser with its inputs in the order of a signature, as `torch.export` needs them."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        return forward(self.denoiser, dict(zip(self.names, tensors, strict=True)))


def trace(
    denoiser: nn.Module, inputs: Sequence[TensorSpec], dimensions: Mapping[str, Bounds] | None = None, maximum_rows: int = MAXIMUM_ROWS
) -> ir.Model:
    """Trace a denoiser into one ONNX graph with taps; its rows are symbolic, and every further dimension that its inputs name.

    Args:
        denoiser: the architecture on the ``meta`` device, in eval mode and in the dtype of the graph; it cannot be used afterwards.
        inputs: its signature, `tgate_trt.models.signature.signature`.
        dimensions: bounds of the further dimensions.
        maximum_rows: the largest batch for which the trace must hold, at least 2.

    Returns:
        A model whose inputs are ``inputs``, whose output is ``noise_pred``, and whose initializers are the denoiser's
        parameters under their state-dict names and shapes, without data.

    Raises:
        BuildError: if PyTorch cannot trace or translate the model.
    """
    by_position = _ByPosition(denoiser, [tensor.name for tensor in inputs])
    return trace_module(by_position, "denoiser", inputs, ("noise_pred",), maximum_rows, dimensions)


def trace_module(
    module: nn.Module,
    attribute: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    maximum_rows: int = MAXIMUM_ROWS,
    dimensions: Mapping[str, Bounds] | None = None,
) -> ir.Model:
    """Trace any module that takes and returns tensors by position.

    Args:
        module: the module whose ``forward(*tensors)`` is traced. Its model is on the ``meta`` device and in eval mode, and cannot be
            used afterwards.
        attribute: the module's attribute that is its model; it is omitted from the parameters' names.
        inputs: the module's inputs; the first dimension of the first one counts rows.
        outputs: names of the module's outputs.
        maximum_rows: the largest batch for which the trace must hold, at least 2.
        dimensions: bounds of the further dimensions that the inputs name.

    Raises:
        BuildError: if PyTorch cannot trace or translate the model.
    """
    model_of_module = getattr(module, attribute)
    computed = _computed_buffers(model_of_module)
    bounds = {ROWS: Bounds(1, 2, maximum_rows)} | dict(dimensions or {})
    try:
        with _quiet():
            model = _translate(_export(module, model_of_module, inputs, bounds))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(
            f"PyTorch could not trace {type(model_of_module).__name__}: {type(error).__name__}: {reason}; "
            "use the versions of constraints.txt, and if it fails with them, report it"
        ) from error
    _name_inputs_and_outputs(model, inputs, outputs)
    parameters = _parameters_to_inputs(model, {tensor.name for tensor in inputs}, f"{attribute}.")
    _simplify(model)
    _inputs_to_initializers(model, parameters, computed)
    return model


def _computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no file of weights holds, such as positions, by name."""
    state = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in state and not buffer.is_meta}


def _export(
    module: nn.Module, denoiser: nn.Module, inputs: Sequence[TensorSpec], bounds: Mapping[str, Bounds]
) -> torch.export.ExportedProgram:
    """Run `torch.export` on fake tensors, with a marker node at each tap."""
    named = {name: torch.export.Dim(name, min=each.minimum, max=each.maximum) for name, each in bounds.items()}
    examples = {name: max(2, each.optimum) for name, each in bounds.items()}  # PyTorch takes 0 and 1 for constants

    def mark(tap: str, output: Tensor) -> Tensor:
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{TAP_DOMAIN}::{TAP_OP}", (output,), attrs={"name": tap}, dtype=output.dtype, shape=output.shape
        )
        return marked

    with FakeTensorMode(shape_env=ShapeEnv()):
        _materialise(denoiser)
        example = tuple(torch.zeros(tensor.concrete(**examples), dtype=torch_dtype(tensor.dtype)) for tensor in inputs)
    dynamic_shapes = (
        tuple({axis: _multiple(size, named) for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in inputs),
    )
    with torch.no_grad(), tapped(denoiser, mark):
        return torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)


def _multiple(size: str, named: Mapping[str, Any]) -> Any:
    """PyTorch's dimension for one size of an input: a name, or a number times a name."""
    *factor, name = size.split("*")
    return int(factor[0]) * named[name] if factor else named[name]


def _materialise(denoiser: nn.Module) -> None:
    """Replace each parameter and buffer by an empty CPU tensor, which takes no memory under a `FakeTensorMode`."""
    for module in denoiser.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _translate(program: torch.export.ExportedProgram) -> ir.Model:
    exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert exported is not None
    return exported.model


def _name_inputs_and_outputs(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
    """Give inputs and outputs our names, and every dimension the names that the inputs have for it."""
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for symbol, size in zip(value.shape, tensor.shape, strict=True):
            names |= dict(zip(names_in(str(symbol).replace(" ", "")), names_in(size), strict=False))
        value.name = tensor.name
        value.shape = ir.Shape(tensor.shape)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([size if isinstance(size, int) else _renamed(str(size), names) for size in value.shape])


def _renamed(expression: str, names: Mapping[str, str]) -> str:
    """A size with our names in the places of PyTorch's symbols: a sorted product where it is one."""
    renamed = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression.replace(" ", ""))
    return "*".join(sorted(renamed.split("*"))) if re.fullmatch(r"\w+(\*\w+)*", renamed) else renamed


def _parameters_to_inputs(model: ir.Model, input_names: set[str], prefix: str) -> list[ir.Value]:
    """Make the parameters inputs under their state-dict names, so that no pass treats them as constants.

    Raises:
        BuildError: if a parameter has the name of an input.
    """
    graph = model.graph
    parameters = [value for name, value in graph.initializers.items() if name.startswith(prefix)]
    for value in parameters:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        value.name = str(value.name).removeprefix(prefix)
        if value.name in input_names:
            raise BuildError(f"the parameter {value.name!r} has the name of an input, so the model cannot be traced; please report it")
        graph.inputs.append(value)
    return parameters


def _inputs_to_initializers(model: ir.Model, parameters: Sequence[ir.Value], computed: Mapping[str, Tensor]) -> None:
    """Make the parameters initializers again.

    Those that files of weights hold get a placeholder for their data, which `tgate_trt.export.weights.attach` replaces; ``computed`` ones
    are part of the graph.
    """
    for value in parameters:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        model.graph.inputs.remove(value)
        if value.name in computed:
            data = computed[value.name].float().numpy().astype(value.dtype.numpy())
            value.const_value = ir.tensor(numpy.ascontiguousarray(data), dtype=value.dtype, name=value.name)
            model.graph.register_initializer(value)
            continue
        value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=value.name)
        model.graph.register_initializer(value)


_TIDY = ir.passes.Sequential(
    RowsFromSamplePass(),
    NoSqueezePass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.IdentityEliminationPass(),
    common.RemoveUnusedOpsetsPass(),
    PromoteConcatPass(),
    common.ClearMetadataAndDocStringPass(),
)


def _simplify(model: ir.Model) -> None:
    """Fold shape arithmetic, remove dead and duplicate nodes, and add the casts that PyTorch makes silently.

    onnxscript's own `optimize` would also try its rewrite rules, at a cost that grows with the square of the number of nodes: on
    SDXL two thirds of the whole trace. Every backend has such rules itself.
    """
    for _ in range(2):  # a fold may uncover the constants of another
        optimizer.fold_constants(model)
        common.RemoveUnusedNodesPass()(model)
    _TIDY(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about packages that we do not use."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
