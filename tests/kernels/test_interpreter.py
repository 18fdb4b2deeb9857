"""Triton's interpreter and its compiler work in one process, whichever comes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tgate_trt.kernels import ahead_of_time
from tgate_trt.kernels.cached_residual_layer_norm import cached_residual_layer_norm_kernel, launch, reference
from tgate_trt.kernels.hand_off import HandOff, hand_off_kernel

from .conftest import Machine

pytest.importorskip("triton")


def interpret_the_norm() -> None:
    hidden, cache, weight = torch.randn(4, 320), torch.randn(4, 320), torch.ones(320)
    outputs = torch.empty(4, 320), torch.empty(4, 320)
    launch(hidden, cache, weight, weight, 1e-5, *outputs, kernel=Machine("cpu").ready(cached_residual_layer_norm_kernel))
    torch.testing.assert_close(outputs, reference(hidden, cache, weight, weight, 1e-5))


def interpret_the_hand_off() -> None:
    output, cache = torch.randn(2, 3, 64), torch.empty(1, 3, 64)
    HandOff({"a": output}, {"a": cache}, Machine("cpu").ready(hand_off_kernel)).run()
    torch.testing.assert_close(cache, output.mean(0, keepdim=True))


def compile_the_norm() -> None:
    ahead_of_time._compile(ahead_of_time.cached_residual_layer_norm(320, torch.float16, 1e-5), 89)


def compile_the_hand_off() -> None:
    ahead_of_time._compile(ahead_of_time.hand_off_of(torch.float16, True), 89)


STEPS = (interpret_the_norm, interpret_the_hand_off, compile_the_norm, compile_the_hand_off)


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids=lambda order: ", ".join(step.__name__ for step in order))
def test_in_any_order(order: tuple[Callable[[], None], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # else only the first order compiles
    for step in order:
        step()
