"""The fused reuse of the cache against PyTorch in fp64, whatever the shape, strides, dtype and magnitude."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgate_trt.errors import GateError, UnsupportedError
from tgate_trt.kernels.cached_residual_layer_norm import (
    TUNED,
    WIDTHS,
    cached_residual_layer_norm,
    cached_residual_layer_norm_kernel,
    launch,
    reference,
)

from .conftest import Machine

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = 1e-5
widths = st.sampled_from([*TUNED, WIDTHS.start, WIDTHS.stop - 1]) | st.integers(WIDTHS.start, WIDTHS.stop - 1)


def strided(shape: tuple[int, ...], gap: int, offset: int, scale: float, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Random values whose rows lie ``gap`` elements apart, in NaN."""
    generator = torch.Generator().manual_seed(seed)
    *rows, width = shape
    memory = torch.full((*rows, offset + width + gap), float("nan"), dtype=dtype)
    memory[..., offset : offset + width] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return memory.to(device)[..., offset : offset + width]


def exactly(hidden: Tensor, cache: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden.double() + cache.double()
    weight, bias = (tensor.to(total) for tensor in (weight, bias))
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, EPSILON)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within two roundings of the dtype (the interpreter's bf16 does not round to the nearest), relative to the largest value."""
    tolerance = max(2 * torch.finfo(got.dtype).eps, 4e-6) * float(expected.abs().max().clamp(min=1e-30))
    assert float((got.double() - expected).abs().max()) <= tolerance


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
@given(data=st.data())
def test_it_equals_pytorch(machine: Machine, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    width = data.draw(widths, label="width")
    shape = (*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), label="rows"), width)
    gaps = st.tuples(st.integers(0, 17), st.integers(0, 3))
    scale = data.draw(st.sampled_from([1e-4, 1.0, 300.0]), label="magnitude")
    seed = data.draw(st.integers(0, 1000), label="seed")
    hidden = strided(shape, *data.draw(gaps, label="hidden"), scale, dtype, machine.device, seed)
    cache = strided(shape, *data.draw(gaps, label="cache"), scale, dtype, machine.device, seed + 1)
    weight = strided((width,), 0, 0, 1.0, dtype, machine.device, seed + 2)
    bias = strided((width,), 0, 0, 1.0, dtype, machine.device, seed + 3)
    outputs = [torch.full(shape, float("nan"), dtype=dtype, device=machine.device) for _ in range(2)]

    launch(hidden, cache, weight, bias, EPSILON, *outputs, kernel=machine.ready(cached_residual_layer_norm_kernel))

    for got, expected in zip(outputs, exactly(hidden, cache, weight, bias), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("width", [320, 1152])
def test_a_large_mean_costs_no_accuracy(machine: Machine, width: int) -> None:
    hidden = 1000 + torch.randn(3, width, device=machine.device)
    cache, weight, bias = torch.randn(3, width, device=machine.device), torch.ones(width), torch.zeros(width)
    outputs = torch.empty_like(hidden), torch.empty_like(hidden)
    launch(
        hidden,
        cache,
        weight.to(machine.device),
        bias.to(machine.device),
        EPSILON,
        *outputs,
        kernel=machine.ready(cached_residual_layer_norm_kernel),
    )
    # 1000 itself has 6e-5 of rounding in fp32.
    torch.testing.assert_close(outputs[1].cpu(), exactly(hidden, cache, weight, bias)[1].float().cpu(), rtol=0, atol=3e-4)


def test_rows_without_a_common_distance(machine: Machine) -> None:
    whole = torch.randn(2, 9, 3, 128, device=machine.device)
    hidden, cache = whole[:, :4, 0], whole[:, 3:7].transpose(1, 2)[:, 1]
    weight, bias = torch.randn(2, 128, device=machine.device)
    outputs = [torch.full((2, 4, 128), float("nan"), device=machine.device) for _ in range(2)]
    launch(hidden, cache, weight, bias, EPSILON, *outputs, kernel=machine.ready(cached_residual_layer_norm_kernel))
    for got, expected in zip(outputs, exactly(hidden, cache, weight, bias), strict=True):
        assert_close(got, expected)


def test_nothing_is_written_outside(machine: Machine) -> None:
    memory = torch.full((2, 5, 320), 7.0, device=machine.device)
    hidden, cache = torch.randn(2, 3, 320, device=machine.device)
    weight, bias = torch.randn(2, 320, device=machine.device)
    launch(hidden, cache, weight, bias, EPSILON, memory[0, 1:4], memory[1, 1:4], kernel=machine.ready(cached_residual_layer_norm_kernel))
    assert (memory[:, [0, 4]] == 7).all()
    assert not (memory[:, 1:4] == 7).any()


def test_no_rows_are_nothing_to_do(machine: Machine) -> None:
    empty = torch.empty(0, 320, device=machine.device)
    weight = torch.ones(320, device=machine.device)
    launch(empty, empty, weight, weight, EPSILON, empty, empty, kernel=machine.ready(cached_residual_layer_norm_kernel))


@pytest.mark.parametrize(("width", "dtype"), [(15, torch.float32), (4097, torch.float32), (320, torch.float64)])
def test_what_the_kernel_does_not_take_is_refused(machine: Machine, width: int, dtype: torch.dtype) -> None:
    tensor = torch.ones(1, width, dtype=dtype, device=machine.device)
    with pytest.raises(UnsupportedError, match="the kernel takes rows of 16 to 4096 in fp16, bf16 or fp32"):
        launch(tensor, tensor, tensor[0], tensor[0], EPSILON, tensor, tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(machine: Machine, dtype: torch.dtype) -> None:
    hidden, cache = torch.randn(2, 2, 4, 160, device=machine.device).to(dtype)
    weight, bias = torch.randn(2, 160, device=machine.device).to(dtype)
    arguments = (hidden.transpose(0, 1), cache.transpose(0, 1), weight, bias, EPSILON)
    torch.library.opcheck(cached_residual_layer_norm, arguments)
    for got, expected in zip(torch.ops.tgate.cached_residual_layer_norm(*arguments), reference(*arguments), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_operator_refuses_what_does_not_fit(device: str) -> None:
    hidden = torch.ones(2, 64, device=device)
    with pytest.raises(GateError, match="hidden is"):
        cached_residual_layer_norm(hidden, hidden[:1], hidden[0], hidden[0], EPSILON)
    with pytest.raises(GateError, match=r"weight and bias must be \[64\]"):
        cached_residual_layer_norm(hidden, hidden, hidden[0, :1], hidden[0], EPSILON)
