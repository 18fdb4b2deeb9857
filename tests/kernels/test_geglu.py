"""GEGLU against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgate_trt.errors import GateError
from tgate_trt.kernels.geglu import BLOCK, geglu, geglu_kernel, launch, reference

from .conftest import Machine

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
@given(data=st.data())
def test_it_equals_pytorch(machine: Machine, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 64, BLOCK - 1, BLOCK, BLOCK + 8, 2560]) | st.integers(1, 99))
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    projected = (torch.randn(rows, 2 * width) * data.draw(st.sampled_from([1e-2, 1.0, 8.0]))).to(dtype).to(machine.device)
    memory = torch.full((rows + 2, width), float("nan"), dtype=dtype, device=machine.device)
    launch(projected, memory[1:-1], kernel=machine.ready(geglu_kernel))
    hidden, gate = projected.double().chunk(2, dim=-1)
    expected = hidden * torch.nn.functional.gelu(gate)
    tolerance = max(2 * torch.finfo(dtype).eps, 4e-6) * float(expected.abs().max().clamp(min=1e-3))
    assert float((memory[1:-1].double() - expected).abs().max()) <= tolerance
    assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(machine: Machine, dtype: torch.dtype) -> None:
    projected = torch.randn(2, 3, 160, device=machine.device).to(dtype).transpose(0, 1)
    torch.library.opcheck(geglu, (projected,))
    got = torch.ops.tgate.geglu(projected)
    assert got.is_contiguous()
    torch.testing.assert_close(got, reference(projected))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(GateError, match="two halves"):
        geglu(torch.ones(2, 3))
