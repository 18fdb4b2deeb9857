"""The hand-off in one launch against PyTorch a tap at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgate_trt.errors import GateError, UnsupportedError
from tgate_trt.kernels.hand_off import BLOCK, HandOff, hand_off_kernel, reference

from .conftest import Machine

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GUARD = 8
"""Elements around each cache that nothing may write."""

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 65)) | st.sampled_from([(64, 64), (64, BLOCK // 64 + 1), (2 * BLOCK // 64, 65)]),
    min_size=1,
    max_size=6,
)


def guarded(elements: int, offset: int, dtype: torch.dtype, device: str) -> Tensor:
    memory = torch.full((GUARD + offset + elements + GUARD,), float("nan"), dtype=dtype, device=device)
    return memory[GUARD + offset : GUARD + offset + elements]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)
@given(data=st.data())
def test_it_equals_pytorch(machine: Machine, data: st.DataObject) -> None:
    dtype, guided = data.draw(st.sampled_from(DTYPES), label="dtype"), data.draw(st.booleans(), label="guided")
    images, offset = data.draw(st.integers(1, 3), label="images"), data.draw(st.sampled_from([0, 0, 1, 8]), label="offset")
    scale = data.draw(st.sampled_from([1e-4, 1.0, 3e4]), label="magnitude")
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    outputs, caches = {}, {}
    for index, (tokens, width) in enumerate(data.draw(shapes, label="taps")):
        memory = guarded((1 + guided) * images * tokens * width, offset, dtype, machine.device)
        memory.copy_((torch.randn(memory.shape) * scale).clamp(-6e4, 6e4))
        outputs[f"tap {index}"] = memory.view(-1, tokens, width)
        caches[f"tap {index}"] = guarded(images * tokens * width, offset, dtype, machine.device).view(images, tokens, width)

    HandOff(outputs, caches, kernel=machine.ready(hand_off_kernel)).run()

    for name, cache in caches.items():
        given = expected = outputs[name].double()
        if guided:
            expected = given.view(2, *cache.shape).mean(0)
        # Of what goes in: halves that cancel each other leave a mean that is far smaller than the rounding of either.
        tolerance = max(2 * torch.finfo(dtype).eps, 4e-6) * float(given.abs().max()) if guided else 0.0
        assert float((cache.double() - expected).abs().max()) <= tolerance
        storage = torch.empty(0, dtype=dtype, device=machine.device).set_(cache.untyped_storage())
        assert storage[: GUARD + offset].isnan().all()
        assert storage[-GUARD:].isnan().all()


@pytest.mark.parametrize("guided", [True, False])
def test_it_writes_what_is_there_when_it_runs(machine: Machine, guided: bool) -> None:
    outputs = {"a": torch.zeros(2 + 2 * guided, 3, 64, device=machine.device)}
    caches = {"a": torch.full((2, 3, 64), float("nan"), device=machine.device)}
    hand_off = HandOff(outputs, caches, kernel=machine.ready(hand_off_kernel))
    for _ in range(2):
        outputs["a"].normal_()
        hand_off.run()
        expected = {"a": torch.empty_like(caches["a"])}
        reference(outputs, expected)
        torch.testing.assert_close(caches, expected)


def test_the_reference_is_the_official_mean() -> None:
    """The official code keeps ``(negative + positive) / 2`` (PyPI ``tgate==1.0.0``)."""
    output = torch.randn(4, 5, 64)
    caches = {"a": torch.empty(2, 5, 64)}
    HandOff({"a": output}, caches).run()
    torch.testing.assert_close(caches["a"], (output[:2] + output[2:]) / 2)


def test_nothing_to_hand_off(machine: Machine) -> None:
    HandOff({"a": torch.zeros(2, 3, device=machine.device)}, {}, kernel=machine.ready(hand_off_kernel)).run()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "there is no attention output for 'a'"),
        (torch.zeros(3, 5, 64), "it takes as many rows or twice as many"),
        (torch.zeros(2, 5, 32), "it takes as many rows or twice as many"),
        (torch.zeros(2, 5, 64, dtype=torch.float16), "in torch.float16"),
        (torch.zeros(2, 64, 5).transpose(1, 2), "contiguous"),
        (torch.zeros(2, 5, 64, device="meta"), "on the same device"),
    ],
)
def test_what_does_not_fit_is_refused(output: Tensor | None, said: str) -> None:
    with pytest.raises(GateError, match=said):
        HandOff({} if output is None else {"a": output}, {"a": torch.zeros(2, 5, 64)})


def test_one_launch_has_one_dtype_and_one_way(machine: Machine) -> None:
    kernel = machine.ready(hand_off_kernel)
    single, half = torch.zeros(2, 5, 64, device=machine.device), torch.zeros(2, 5, 64, device=machine.device, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="all means or all copies"):
        HandOff({"a": single, "b": half}, {"a": single, "b": half}, kernel=kernel)
    with pytest.raises(UnsupportedError, match="all means or all copies"):
        HandOff({"a": single, "b": single}, {"a": single, "b": single[:1].clone()}, kernel=kernel)


def test_without_triton_pytorch_does_it() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None
import torch
from tgate_trt.kernels.cached_residual_layer_norm import cached_residual_layer_norm
from tgate_trt.kernels.hand_off import HandOff
caches = {"a": torch.zeros(1, 2, 64)}
HandOff({"a": torch.cat([torch.ones(1, 2, 64), torch.zeros(1, 2, 64)])}, caches).run()
ones = torch.ones(64)
print(caches["a"].unique().item(), cached_residual_layer_norm(caches["a"], caches["a"], ones, ones, 1e-5)[0].unique().item())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["0.5", "1.0"]
