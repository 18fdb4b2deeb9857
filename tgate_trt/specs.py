"""Inputs and outputs of graphs: the data that tracing, engines and the runtime share.

A shape has numbers, and names for dimensions that may vary, such as ``("batch", 4, 64, 64)``. The graph has the `Bounds` of each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tgate_trt.errors import BundleError, InputError

PRECISIONS = ("fp32", "fp16", "bf16")
"""Precisions of a graph, by their names in the commands."""

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The dtype of each precision, by its name in NumPy and PyTorch."""


@dataclass(frozen=True)
class Bounds:
    """The sizes that a varying dimension may take."""

    minimum: int
    """Smallest size that an engine accepts."""
    optimum: int
    """Size for which an engine is tuned."""
    maximum: int
    """Largest size that an engine accepts."""

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            InputError: unless 1 <= minimum <= optimum <= maximum.
        """
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"bounds must satisfy 1 <= min <= opt <= max, got {self}; write them as MIN:OPT:MAX")

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Read ``"MIN:OPT:MAX"``, or one number for all three.

        Raises:
            InputError: if the text is neither, or the numbers are out of order.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
            raise InputError(f"a batch size is MIN:OPT:MAX or one number, such as 1:1:4, got {text!r}")
        sizes = [int(part) for part in parts]
        return cls(*sizes) if len(sizes) == 3 else cls(sizes[0], sizes[0], sizes[0])


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output of a graph."""

    name: str
    dtype: str
    """``"float32"``, ``"float16"`` or ``"bfloat16"``."""
    shape: tuple[int | str, ...]
    """Sizes, with a name for each dimension that may vary."""

    def concrete(self, **sizes: int) -> tuple[int, ...]:
        """The shape with sizes for its named dimensions, as in ``spec.concrete(batch=2)``."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """The inputs and outputs of one graph, and of every engine that is built from it."""

    name: str
    """A key of `tgate_trt.taps.GRAPHS`, such as ``"planning"``, or a component's name."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: Mapping[str, Bounds] = field(default_factory=dict)
    """Bounds of every dimension that a shape names. ``batch`` counts rows, two for each image under guidance."""

    @property
    def cache_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that are caches, in graph order."""
        return tuple(tensor for tensor in self.inputs if tensor.name.startswith(CACHE_PREFIX))

    @property
    def cache_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that become caches, in graph order."""
        return tuple(tensor for tensor in self.outputs if tensor.name.startswith(CACHE_PREFIX))

    def shapes_within_bounds(self, tensor: TensorSpec) -> list[tuple[int, ...]]:
        """The minimum, optimum and maximum shape of one of this graph's tensors."""
        return [
            tensor.concrete(**{name: getattr(bounds, which) for name, bounds in self.dimensions.items()})
            for which in ("minimum", "optimum", "maximum")
        ]

    def to_json(self) -> dict[str, Any]:
        """This spec as JSON data, each tensor with its min, opt and max shape."""
        return {
            "name": self.name,
            "dimensions": {name: [b.minimum, b.optimum, b.maximum] for name, b in self.dimensions.items()},
            "inputs": [self._tensor_to_json(tensor) for tensor in self.inputs],
            "outputs": [self._tensor_to_json(tensor) for tensor in self.outputs],
        }

    def _tensor_to_json(self, tensor: TensorSpec) -> dict[str, Any]:
        minimum, optimum, maximum = map(list, self.shapes_within_bounds(tensor))
        shapes = {"shape": list(tensor.shape), "min": minimum, "opt": optimum, "max": maximum}
        return {"name": tensor.name, "dtype": tensor.dtype, **shapes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GraphSpec:
        """Read what `to_json` wrote.

        Raises:
            BundleError: if the data has another form.
        """
        try:
            return cls(
                data["name"],
                tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data["inputs"]),
                tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data["outputs"]),
                {key: Bounds(*sizes) for key, sizes in data["dimensions"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"a graph's tensors are not described as this version expects ({error!r}); build the bundle again") from error


CACHE_PREFIX = "cache."
"""Prefix of the names of tensors that pass a tap's value from one graph to another."""

ROWS = "batch"
"""Name of the dimension that counts rows: two for each image under classifier-free guidance, else one."""

MAXIMUM_ROWS = 63
"""Largest batch for which a trace holds: from 64 rows on, diffusers' `Upsample2D` takes another path."""
