"""The kernels on this machine's GPU: bandwidth against a plain copy, and against PyTorch eager and compiled; and what they compile to.

Times are of many launches in one CUDA graph, over sets of inputs that together exceed the GPU's cache several times, so that
every byte comes from memory. Percentages are of a copy of as many bytes, timed in the same way in the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgate_trt.bench.spread import in_rounds, ratios, spread
from tgate_trt.bench.stopwatch import seconds_of
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.pytorch import PyTorchEngine, PyTorchOptions
from tgate_trt.errors import UnsupportedError
from tgate_trt.export.verify import random_inputs
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.kernels import ahead_of_time, cached_residual_layer_norm, geglu, group_norm, hand_off
from tgate_trt.kernels.language import HAS_TRITON
from tgate_trt.taps import recipe

EPSILON = 1e-5
DTYPE = torch.float16

SHAPES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "sdxl": ((10, 4096, 640), (60, 1024, 1280)),
    "sd15": ((5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280)),
    "pixart-alpha": ((28, 4096, 1152),),
}
"""Taps of a picture at native size: their number, tokens and width."""

NORMS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "sdxl": ((128, 320), (64, 640), (32, 1280)),
    "sd15": ((64, 320), (32, 640), (16, 1280)),
    "VAE at 1024²": ((1024, 128), (512, 256)),
}
"""Sides and channels of the pictures that go through a GroupNorm at native size."""
GATES: Mapping[str, tuple[tuple[int, int], ...]] = {"sdxl": ((4096, 2560), (1024, 5120)), "sd15": ((4096, 1280), (256, 5120))}
"""Tokens and width of what goes through a GEGLU at native size."""

RESOURCES = ("registers", "shared_bytes", "spilled_bytes", "warps")
"""What `resources` gives of each compiled kernel; see `ahead_of_time.CompiledKernel`."""

_LEAST_BYTES = 400 << 20
"""Least bytes of all sets of inputs together: several times the 50 MB of the largest cache."""
_LAUNCHES = 50
"""Least launches in one CUDA graph."""
_WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """Functions that compute the same, to be compared, and the bytes that the best of them must move."""

    kernel: str
    what: str
    bytes_moved: int
    ways: Mapping[str, Sequence[Callable[[], object]]]
    """By name, a call for each set of inputs; percentages are of ``copy``, and ``kernel`` is ours."""


def resources() -> list[dict[str, Any]]:
    """Compile each kernel for every GPU of `ahead_of_time.TARGETS`, and give `RESOURCES` of each; needs no GPU.

    Raises:
        UnsupportedError: if Triton is not installed.
    """
    wanted = {
        f"cached_residual_layer_norm, {width}": ahead_of_time.cached_residual_layer_norm(width, DTYPE, EPSILON)
        for width in cached_residual_layer_norm.TUNED
    }
    wanted["hand_off"] = ahead_of_time.hand_off_of(DTYPE, True)
    rows = []
    for capability in ahead_of_time.TARGETS:
        for name, specialisation in wanted.items():
            compiled = ahead_of_time.compile_kernel(specialisation, capability)
            rows.append({"kernel": name, "capability": capability} | {each: getattr(compiled, each) for each in RESOURCES})
    return rows


def measure(rounds: int, models: Sequence[str] = tuple(SHAPES)) -> Iterator[list[dict[str, Any]]]:
    """Time every case, all of its ways in each round.

    Args:
        rounds: number of rounds.
        models: names of `SHAPES`.

    Yields:
        After each case, the results of all cases so far: for each its ``kernel``, ``what``, ``bytes_moved``, and by way the
        ``seconds`` of a call, ``gigabytes_per_second`` and ``of_copy``, each with its spread.

    Raises:
        UnsupportedError: if there is no GPU, or no Triton.
    """
    if not torch.cuda.is_available() or not HAS_TRITON:
        raise UnsupportedError("timing the kernels needs an NVIDIA GPU and Triton; run it on a machine that has both")
    results = []
    for case in _cases(models):
        torch._dynamo.reset()  # else the ninth case meets the limit of recompilations, and runs without being compiled
        clocks = {name: partial(_time, *_captured(calls)) for name, calls in case.ways.items()}
        results.append(_result(case, in_rounds(clocks, rounds)))
        yield results


def _result(case: Case, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    ways = {
        name: {
            "seconds": spread(row),
            "gigabytes_per_second": spread([case.bytes_moved / seconds / 1e9 for seconds in row]),
            "of_copy": spread([copy / own for own, copy in zip(row, samples["copy"], strict=True)]),
        }
        for name, row in samples.items()
    }
    return {"kernel": case.kernel, "what": case.what, "bytes_moved": case.bytes_moved, "ways": ways}


def _cases(models: Sequence[str]) -> Iterator[Case]:
    for model in models:
        for batch in (1, 4):
            for tokens, width in dict.fromkeys(shape[1:] for shape in SHAPES[model]):
                yield _norm(model, batch, tokens, width)
            yield _hand_off(model, batch)
    for model, shapes in NORMS.items():
        for side, width in shapes:
            yield _group_norm(model, side, width)
    for model, shapes in GATES.items():
        for tokens, width in shapes:
            yield _gate(model, tokens, width)


def _group_norm(model: str, side: int, width: int) -> Case:
    """A GroupNorm with SiLU of one picture, channels last: one tensor read and one written, if a cache held it between two readings."""
    weight, bias = torch.randn(2, width, device="cuda").to(DTYPE)
    moved = 2 * side * side * width * DTYPE.itemsize
    shape = (1, width, side, side)
    sets = [torch.randn(2, *shape, device="cuda").to(DTYPE) for _ in range(_sets(moved))]
    pairs = [tuple(each.contiguous(memory_format=torch.channels_last) for each in pair) for pair in sets]

    def unfused(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, weight, bias, EPSILON))

    compiled = torch.compile(unfused, dynamic=False)
    ways: dict[str, Sequence[Callable[[], object]]] = {
        "copy": [partial(normed.copy_, x) for x, normed in pairs],
        "kernel": [partial(group_norm.launch, x, weight, bias, 32, EPSILON, True, None, normed) for x, normed in pairs],
        "eager": [partial(unfused, x) for x, _ in pairs],
        "torch.compile": [partial(compiled, x) for x, _ in pairs],
    }
    return Case("group_norm", f"{model}, batch 1, {side}²×{width}", moved, ways)


def _gate(model: str, tokens: int, width: int) -> Case:
    """A GEGLU of one picture: two halves read, one written."""
    moved = 3 * tokens * width * DTYPE.itemsize
    sets = [torch.randn(tokens, 3 * width, device="cuda").to(DTYPE) for _ in range(_sets(moved))]
    pairs = [(each[:, : 2 * width].contiguous(), torch.empty(tokens, width, device="cuda", dtype=DTYPE)) for each in sets]
    copies = [torch.empty(2, moved // 2 // DTYPE.itemsize, device="cuda", dtype=DTYPE).normal_() for _ in sets]

    def unfused(projected: Tensor) -> Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * torch.nn.functional.gelu(gate)

    compiled = torch.compile(unfused, dynamic=False)
    ways: dict[str, Sequence[Callable[[], object]]] = {
        "copy": [partial(each[0].copy_, each[1]) for each in copies],
        "kernel": [partial(geglu.launch, *pair) for pair in pairs],
        "eager": [partial(unfused, pair[0]) for pair in pairs],
        "torch.compile": [partial(compiled, pair[0]) for pair in pairs],
    }
    return Case("geglu", f"{model}, batch 1, {tokens}×{width}", moved, ways)


def _norm(model: str, batch: int, tokens: int, width: int) -> Case:
    """The reuse of one cache: two tensors read, two written."""
    shape = (batch, tokens, width)
    weight, bias = torch.randn(2, width, device="cuda").to(DTYPE)
    moved = 4 * batch * tokens * width * DTYPE.itemsize
    sets = [torch.randn(4, *shape, device="cuda").to(DTYPE) for _ in range(_sets(moved))]

    def unfused(hidden: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden + cache
        return residual, torch.nn.functional.layer_norm(residual, (width,), weight, bias, EPSILON)

    compiled = torch.compile(unfused, dynamic=False)

    def ours(tensors: Tensor) -> None:
        hidden, cache, residual, normed = tensors
        cached_residual_layer_norm.launch(hidden, cache, weight, bias, EPSILON, residual, normed)

    ways: dict[str, Sequence[Callable[[], object]]] = {
        "copy": [partial(each[2:].copy_, each[:2]) for each in sets],
        "kernel": [partial(ours, each) for each in sets],
        "eager": [partial(unfused, each[0], each[1]) for each in sets],
        "torch.compile": [partial(compiled, each[0], each[1]) for each in sets],
    }
    return Case("cached_residual_layer_norm", f"{model}, batch {batch}, {tokens}×{width}", moved, ways)


def _hand_off(model: str, batch: int) -> Case:
    """All taps of a step: two halves read, their mean written."""
    shapes = [(batch, tokens, width) for count, tokens, width in SHAPES[model] for _ in range(count)]

    def make() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs = {str(place): torch.randn(2 * rows, *rest, device="cuda").to(DTYPE) for place, (rows, *rest) in enumerate(shapes)}
        return outputs, {name: torch.empty_like(output[: len(output) // 2]) for name, output in outputs.items()}

    first = make()
    moved = sum(tensor.nbytes for part in first for tensor in part.values())
    sets = [first, *(make() for _ in range(_sets(moved) - 1))]

    def means(outputs: list[Tensor]) -> list[Tensor]:
        return [torch.lerp(output[: len(output) // 2], output[len(output) // 2 :], 0.5) for output in outputs]

    compiled = torch.compile(means, dynamic=False)
    half = [torch.randn(moved // 2 // DTYPE.itemsize, device="cuda").to(DTYPE) for _ in sets]
    ways: dict[str, Sequence[Callable[[], object]]] = {
        "copy": [partial(torch.empty_like(each).copy_, each) for each in half],
        "kernel": [hand_off.HandOff(*each).run for each in sets],
        "eager": [partial(hand_off.reference, *each) for each in sets],
        "torch.compile": [partial(compiled, list(outputs.values())) for outputs, _ in sets],
    }
    return Case("hand_off", f"{model}, batch {batch}, {len(shapes)} taps", moved, ways)


def _sets(moved: int) -> int:
    """Number of sets of inputs that together exceed the cache."""
    return max(1, -(-_LEAST_BYTES // moved))


def _captured(calls: Sequence[Callable[[], object]]) -> tuple[Any, int]:
    """A CUDA graph of calls in turn, and their number."""
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    turns = max(1, -(-_LAUNCHES // len(calls)))
    graph, results = torch.cuda.CUDAGraph(), list[object]()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            results = [call() for call in calls]  # each is held, so that all write to memory of their own, as the kernel does
    del results
    graph.replay()
    return graph, turns * len(calls)


def _time(graph: Any, calls: int) -> float:
    """Seconds of one call, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def fusion(bundle: Bundle, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time a whole fidelity step of one picture in PyTorch, with the fused reuse of the cache and without it.

    Args:
        bundle: a bundle that holds its weights.
        rounds: number of rounds.
        device: where the step runs.

    Returns:
        ``fused`` and ``unfused``, the seconds of a step, and their ``ratio``, each with its spread.
    """
    from safetensors.torch import load_file

    weights = load_file(bundle.folder / WEIGHTS_FILE, device=str(device))
    dtype = next(iter(weights.values())).dtype
    spec = bundle.graph("fidelity")
    inputs = {name: value.to(device) for name, value in random_inputs(spec.inputs, spec.sizes(1), torch.Generator().manual_seed(0)).items()}
    outputs = {"noise_pred": torch.empty(spec.outputs[0].concrete(**spec.sizes(1)), dtype=dtype, device=device)}
    engines = {
        name: PyTorchEngine(
            bundle.denoiser_on_meta(dtype), weights, spec, recipe("fidelity"), device, PyTorchOptions(fuse_cache_reuse=name == "fused")
        )
        for name in ("fused", "unfused")
    }

    ways = {name: partial(seconds_of, partial(engine.run, inputs, outputs), device) for name, engine in engines.items()}
    in_rounds(ways, _WARM_UP)
    samples = in_rounds(ways, rounds)
    return {name: spread(row) for name, row in samples.items()} | {"ratio": ratios(samples["fused"], samples["unfused"])}
