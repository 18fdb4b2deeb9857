"""An ONNX graph as a TensorRT network, compared with its spec, and the optimisation profile of the spec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tgate_trt.engines.tensorrt_flavours import DTYPES, Api
from tgate_trt.errors import BuildError
from tgate_trt.specs import GraphSpec

if TYPE_CHECKING:
    import tensorrt

_SOURCES = re.compile(r"\[\w+\.(cpp|h)::.*|\s*In \w+ at /_src/[^)]*")
"""Places in TensorRT's own source files, and what follows the first of them."""


def parse(trt: Api, builder: tensorrt.Builder, graph: Path, trt_logger: tensorrt.ILogger) -> tuple[tensorrt.INetworkDefinition, object]:
    """Parse an ONNX file into a strongly typed network.

    Returns:
        The network, and the parser, which owns the weights that the network refers to.

    Raises:
        BuildError: naming the node that cannot be parsed.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt_logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError("; ".join(_described(parser.get_error(i)) for i in range(parser.num_errors)) or "the parser gave no reason")
    return network, parser


def _described(error: tensorrt.ParserError) -> str:
    operator, name = error.node_operator(), error.node_name() or f"number {error.node()}"
    return (f"node {name!r} ({operator}): " if operator else "") + one_line(error.desc())


def one_line(message: str) -> str:
    """A message of TensorRT in one line, without places in its source files."""
    return _SOURCES.sub("", " ".join(message.split())).strip(" .") or "no reason given"


def check_network(network: tensorrt.INetworkDefinition, spec: GraphSpec) -> None:
    """Compare a network's inputs and outputs with the spec: names, dtypes and shapes, -1 where a dimension is named.

    Raises:
        BuildError: naming the first tensor that differs.
    """
    for what, tensors, count, get in (
        ("input", spec.inputs, network.num_inputs, network.get_input),
        ("output", spec.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: tensor for tensor in map(get, range(count))}
        for name in found.keys() ^ {tensor.name for tensor in tensors}:
            raise BuildError(f"the {what} {name!r} is {'not expected' if name in found else 'missing'}")
        for tensor in tensors:
            expected = (DTYPES[tensor.dtype], tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
            actual = (found[tensor.name].dtype.name, tuple(cast(Any, found[tensor.name].shape)))
            if actual != expected:
                raise BuildError(
                    f"the {what} {tensor.name!r} is {actual[0]} {list(actual[1])} instead of {expected[0]} {list(expected[1])}"
                )


def add_profile(builder: tensorrt.Builder, config: tensorrt.IBuilderConfig, spec: GraphSpec) -> tensorrt.IOptimizationProfile:
    """Add one optimisation profile: the minimum, optimum and maximum shape of every input with a named dimension."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            minimum, optimum, maximum = (cast(Any, shape) for shape in spec.shapes_within_bounds(tensor))
            profile.set_shape(tensor.name, minimum, optimum, maximum)
    config.add_optimization_profile(profile)
    return profile
