"""Inputs and outputs of graphs: the data that tracing, engines and the runtime share.

A shape has numbers, and names for dimensions that may vary, such as ``("batch", 4, 64, 64)``. A size may also be a product of names
and a number, such as ``"16*height*width"``. The graph has the `Bounds` of each name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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

    @property
    def short(self) -> str:
        """The same as text, but one number for one size."""
        return str(self.optimum) if self.is_one else str(self)

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum

    @property
    def is_one(self) -> bool:
        """Whether they leave one size."""
        return self.minimum == self.maximum

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Read ``"MIN:OPT:MAX"``, or one number for all three.

        Raises:
            InputError: if the text is neither, or the numbers are out of order.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
            raise InputError(f"a range is MIN:OPT:MAX or one number, such as 1:1:4, got {text!r}")
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
        return tuple(size_of(size, sizes) for size in self.shape)

    @property
    def has_rows(self) -> bool:
        """Whether its first dimension counts rows; else it is the same for all rows, as positions are."""
        return bool(self.shape) and self.shape[0] == ROWS


def size_of(size: int | str, sizes: Mapping[str, int]) -> int:
    """One size of a shape, with sizes for its names."""
    if isinstance(size, int):
        return size
    return math.prod(int(factor) if factor.isdecimal() else sizes[factor] for factor in size.split("*"))


def times(size: int | str, factor: int) -> int | str:
    """A size of a shape, multiplied: ``times("8*height", 8)`` is ``"64*height"``."""
    if isinstance(size, int):
        return size * factor
    own, _, name = size.rpartition("*")
    return f"{int(own or 1) * factor}*{name}"


def sizes_in(spec: GraphSpec, tensors: Mapping[str, Any]) -> dict[str, int]:
    """The size of each dimension that one of a graph's inputs names, read from the tensors that are given.

    Args:
        spec: the graph.
        tensors: by name; others than the graph's inputs, and those of another rank, do not count.
    """
    found: dict[str, int] = {}
    for tensor in spec.inputs:
        value = tensors.get(tensor.name)
        if value is None or len(value.shape) != len(tensor.shape):
            continue
        for size, actual in zip(tensor.shape, value.shape, strict=True):
            if isinstance(size, str) and len(names := list(names_in(size))) == 1:
                found.setdefault(names[0], actual // size_of(size, {names[0]: 1}))
    return found


def names_in(size: int | str) -> Iterator[str]:
    """The names in one size of a shape."""
    if isinstance(size, str):
        yield from (factor for factor in size.split("*") if not factor.isdecimal())


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

    def sizes(self, rows: int) -> dict[str, int]:
        """A size for each dimension: so many rows, and the optimum of the others."""
        return {name: bounds.optimum for name, bounds in self.dimensions.items()} | {ROWS: rows}

    def admits(self, tensor: TensorSpec, shape: Sequence[int]) -> bool:
        """Whether a value of a shape can be one of this graph's tensors."""
        return len(shape) == len(tensor.shape) and all(map(self._admits, tensor.shape, shape))

    def _admits(self, own: int | str, size: int) -> bool:
        """The same for one size; engines ask it for every tensor of every call."""
        if isinstance(own, int):
            return size == own
        if own in self.dimensions:
            return size in self.dimensions[own]
        low, high = (size_of(own, {name: getattr(self.dimensions[name], end) for name in names_in(own)}) for end in ("minimum", "maximum"))
        return low <= size <= high

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

TOKENS = "tokens"
"""Name of the dimension that counts the tokens of an encoded prompt."""

LONGEST_TEXT = Bounds(1, 77, 4096)
"""Tokens for which a trace holds; an engine of TensorRT takes those of its profile."""

HEIGHT, WIDTH = "height", "width"
"""Names of the sides of a picture, in units of the smallest step by which a model's pictures can grow."""

MAXIMUM_ROWS = 63
"""Largest batch for which a trace holds: from 64 rows on, diffusers' `Upsample2D` takes another path."""
