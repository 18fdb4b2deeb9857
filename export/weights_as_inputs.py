"""A graph whose weights are inputs: its engine holds none, and runs every checkpoint of the architecture."""

from __future__ import annotations

import onnx_ir as ir

from tgate_trt.specs import TensorSpec


def turn_weights_into_inputs(model: ir.Model, *, convolutions: bool = True) -> dict[str, TensorSpec]:
    """Make a graph's parameters inputs under their own names.

    Args:
        model: a graph whose parameters are external data; it is modified.
        convolutions: whether the parameters of convolutions become inputs too. As constants, they allow an engine to choose kernels
            and to pack weights when it is built.

    Returns:
        The parameters that became inputs, by name, in the graph's order.
    """
    kept = set() if convolutions else {value for node in model.graph if node.op_type == "Conv" for value in node.inputs}
    parameters = {}
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor) or value in kept:
            continue
        assert value.shape is not None and value.dtype is not None
        model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
        parameters[name] = TensorSpec(name, str(value.dtype.numpy()), tuple(int(size) for size in value.shape.numpy()))
    return parameters
