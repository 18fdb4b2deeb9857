"""Compare a graph with the eager model in fp32 on new random inputs.

The error of an output is ``‖graph − eager‖₂ / ‖eager‖₂``; a check reports its worst output.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tgate_trt.eager import torch_dtype
from tgate_trt.errors import VerificationError
from tgate_trt.specs import CACHE_PREFIX, ROWS, GraphSpec, TensorSpec

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}
"""Largest relative L2 error that a graph of each precision may have against fp32."""

Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""Runs a graph, given inputs and caller-owned outputs by name."""

RunEager = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs the eager model in fp32 on inputs by name, and returns outputs by name."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    rows: int
    """Rows of the batch."""
    error: float
    """Relative L2 error of the worst output."""
    output: str
    """Name of the worst output."""


@dataclass(frozen=True)
class Report:
    """The comparisons of one graph."""

    graph: str
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def worst(self) -> Check:
        """The check with the largest error."""
        return max(self.checks, key=lambda check: _badness(check.error))

    def raise_if_wrong(self, subject: str | None = None) -> None:
        """Check the errors against the tolerance.

        Args:
            subject: of the error's sentence; the graph if None.

        Raises:
            VerificationError: if one is above it, or not a number.
        """
        if not self.worst.error <= self.tolerance:
            raise VerificationError(
                f"{subject or f'the {self.graph} graph'} differs from eager PyTorch: relative error {self.worst.error:.2e} in "
                f"{self.worst.output!r} at {self.worst.rows} rows, tolerance {self.tolerance:.0e}; nothing was written"
            )


@dataclass(frozen=True)
class Case:
    """Random inputs, and what the eager model makes of them."""

    sizes: Mapping[str, int]
    """Of each dimension that the inputs' shapes name."""
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]


def verify(
    load_denoiser: Callable[[], nn.Module],
    load_graph: Callable[[], Run],
    spec: GraphSpec,
    run_eager: RunEager,
    signature: Sequence[TensorSpec],
    *,
    rows: Sequence[int | Mapping[str, int]],
    precision: str,
    vocabulary: int = 1,
    seed: int | None = None,
) -> Report:
    """Run the eager model, free it, then run the graph on the same inputs.

    Only one of the two is in memory at a time.

    Args:
        load_denoiser: returns the eager model in fp32.
        load_graph: returns a function that runs the graph on the CPU.
        spec: the graph's inputs and outputs.
        run_eager: runs the eager model on the same inputs and returns the graph's outputs.
        signature: inputs of the whole model, all of which the eager model needs.
        rows: batch sizes to compare at, or sizes of all dimensions that the shapes name.
        precision: precision of the graph, which determines the tolerance.
        vocabulary: upper bound of random token ids, exclusive.
        seed: seed of the random inputs; a new one if None.
    """
    cases = cases_of(load_denoiser, run_eager, (*signature, *spec.inputs), rows=rows, vocabulary=vocabulary, seed=seed)
    return compare(load_graph(), spec, cases, precision)


def cases_of(
    load_denoiser: Callable[[], nn.Module],
    run_eager: RunEager,
    inputs: Sequence[TensorSpec],
    *,
    rows: Sequence[int | Mapping[str, int]],
    vocabulary: int = 1,
    seed: int | None = None,
) -> list[Case]:
    """Random inputs of each number of rows with the eager model's outputs; the model is freed again. See `verify`."""
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    every_input = tuple({tensor.name: tensor for tensor in inputs}.values())
    sizes = [{ROWS: size} if isinstance(size, int) else size for size in rows]
    drawn = [random_inputs(every_input, each, generator, vocabulary) for each in sizes]
    denoiser = load_denoiser()
    cases = [
        Case(each, case, run_eager(denoiser, {name: _widened(tensor) for name, tensor in case.items()}))
        for each, case in zip(sizes, drawn, strict=True)
    ]
    del denoiser
    gc.collect()
    return cases


def compare(run: Run, spec: GraphSpec, cases: Sequence[Case], precision: str) -> Report:
    """Run a graph, or an engine of it, and compare each output with the eager model's."""
    return Report(spec.name, TOLERANCES[precision], tuple(_check(run, spec, case) for case in cases))


def random_inputs(
    tensors: Sequence[TensorSpec], rows: int | Mapping[str, int], generator: torch.Generator, vocabulary: int = 1
) -> dict[str, Tensor]:
    """Random values: unit normal, but steps from 0 to 1000 for ``timestep``, zeros and ones for masks, and token ids for integers.

    The values are rounded to the tensors' dtypes, so that graph and model read the same numbers.

    Args:
        tensors: what to make.
        rows: of the batch, or the size of each dimension that the shapes name.
        generator: of the values.
        vocabulary: upper bound of token ids, exclusive.
    """
    sizes = {ROWS: rows} if isinstance(rows, int) else rows
    values = {}
    for tensor in tensors:
        value = torch.randn(tensor.concrete(**sizes), generator=generator)
        if tensor.name == "timestep":
            value = torch.rand(value.shape, generator=generator) * 1000
        elif tensor.name.partition(".")[0].endswith("mask"):
            value = (torch.rand(value.shape, generator=generator) < 0.7).float()
            value[..., 0] = 1  # a row without any token has no attention
        elif tensor.dtype == "int64":
            value = torch.randint(vocabulary, value.shape, generator=generator)
        values[tensor.name] = value.to(torch_dtype(tensor.dtype))
    return values


def _check(run: Run, spec: GraphSpec, case: Case) -> Check:
    outputs = {o.name: torch.full(o.concrete(**case.sizes), torch.nan, dtype=torch_dtype(o.dtype)) for o in spec.outputs}
    run({tensor.name: case.inputs[tensor.name] for tensor in spec.inputs}, outputs)
    expected = case.expected
    errors = {name: relative_error(outputs[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: _badness(errors[name]))
    return Check(case.sizes[ROWS], errors[worst], worst.removeprefix(CACHE_PREFIX))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖₂ / ‖expected‖₂``, with sums in fp64."""
    difference = (actual.float() - expected.float()).norm(dtype=torch.float64)
    return float(difference / expected.norm(dtype=torch.float64))


def _badness(error: float) -> float:
    """An error as a sort key, with not-a-number above all others."""
    return math.inf if math.isnan(error) else error
