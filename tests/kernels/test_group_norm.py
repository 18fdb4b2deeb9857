"""GroupNorm with channels last against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.kernels import group_norm as module
from tgate_trt.kernels.group_norm import group_norm, groups_kernel, launch, moments_kernel, normalise_kernel, reference

from .conftest import Machine

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = 1e-5


def picture(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) * scale + mean).to(dtype).to(device).contiguous(memory_format=torch.channels_last)


def exactly(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, shift: Tensor | None) -> Tensor:
    total = x.double() if shift is None else x.double() + shift.double()[:, :, None, None]
    normed = torch.nn.functional.group_norm(total, groups, weight.double(), bias.double(), EPSILON)
    return torch.nn.functional.silu(normed) if silu else normed


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
@given(data=st.data())
def test_it_equals_pytorch(machine: Machine, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    groups, per_group = data.draw(st.sampled_from([1, 3, 8, 32]), label="groups"), data.draw(st.integers(1, 10), label="channels")
    shape = (data.draw(st.integers(1, 3)), groups * per_group, data.draw(st.integers(1, 13)), data.draw(st.integers(2, 17)))
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    x = picture(shape, dtype, machine.device, data.draw(st.sampled_from([1e-2, 1.0, 30.0]), label="scale"))
    weight, bias = torch.randn(2, shape[1]).to(dtype).to(machine.device)
    shift = torch.randn(shape[:2]).to(dtype).to(machine.device) if data.draw(st.booleans(), label="shift") else None
    silu = data.draw(st.booleans(), label="silu")
    normed = torch.full_like(x, float("nan"))

    kernels = tuple(map(machine.ready, (moments_kernel, groups_kernel, normalise_kernel)))
    launch(x, weight, bias, groups, EPSILON, silu, shift, normed, kernels)  # type: ignore[arg-type]

    expected = exactly(x, weight, bias, groups, silu, shift)
    tolerance = max(2 * torch.finfo(dtype).eps, 2e-5) * float(expected.abs().max().clamp(min=1e-3))
    assert float((normed.double() - expected).abs().max()) <= tolerance


def test_many_chunks_and_a_large_mean_cost_no_accuracy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNKS", 70)
    x = picture((1, 64, 71, 130), torch.float32, machine.device, mean=100.0)
    weight, bias = torch.ones(64, device=machine.device), torch.zeros(64, device=machine.device)
    normed = torch.full_like(x, float("nan"))
    kernels = tuple(map(machine.ready, (moments_kernel, groups_kernel, normalise_kernel)))
    launch(x, weight, bias, 32, EPSILON, False, None, normed, kernels)  # type: ignore[arg-type]
    assert float((normed.double() - exactly(x, weight, bias, 32, False, None)).abs().max()) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
def test_the_operator(machine: Machine, dtype: torch.dtype, silu: bool) -> None:
    x = torch.randn(2, 64, 5, 6, device=machine.device).to(dtype)
    weight, bias, shift = (tensor.to(dtype) for tensor in torch.randn(3, 64, device=machine.device))
    arguments = (x, weight, bias, 8, EPSILON, silu, torch.stack([shift, -shift]))
    torch.library.opcheck(group_norm, arguments)
    got = torch.ops.tgate.group_norm(*arguments)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, reference(*arguments))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(2, 64, 3, 3), torch.ones(64)
    with pytest.raises(GateError, match="64 channels do not fit 7 groups"):
        group_norm(x, weight, weight, 7, EPSILON, True)
    with pytest.raises(GateError, match=r"the addition must be \[2, 64\]"):
        group_norm(x, weight, weight, 8, EPSILON, True, torch.ones(1, 64))
