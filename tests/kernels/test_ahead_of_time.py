"""Kernels compiled for GPUs that are not here: what comes out is what a launcher other than Triton's needs."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tgate_trt.errors import BuildError, UnsupportedError
from tgate_trt.kernels.ahead_of_time import (
    TARGETS,
    Specialisation,
    _without_scratch,
    cached_residual_layer_norm,
    compile_kernel,
    hand_off_of,
    parameters_of,
)
from tgate_trt.kernels.cached_residual_layer_norm import TUNED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EM_CUDA = 190


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def is_cubin(cubin: bytes) -> bool:
    return cubin[:4] == b"\x7fELF" and int.from_bytes(cubin[18:20], "little") == EM_CUDA


def may_spill() -> int:
    """Bytes that a thread may spill: Triton 3.6 spills some in fp32 on SM80, later versions none."""
    return 16 if metadata.version("triton").startswith("3.6.") else 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", TARGETS)
def test_the_norm_at_tuned_widths(capability: int, dtype: torch.dtype, folder: Path) -> None:
    for width in TUNED:
        compiled = compile_kernel(cached_residual_layer_norm(width, dtype, 1e-5), capability, folder)
        assert parameters_of(compiled.ptx, compiled.entry) == ["u64"] * 4 + ["u32"] + ["u64"] * 2
        assert [type_[0] for type_ in compiled.arguments] == ["*"] * 4 + ["i"] + ["*"] * 2
        assert re.search(rf"^\.target sm_{capability}a?$", compiled.ptx, re.MULTILINE)
        assert f".reqntid {32 * compiled.warps}" in compiled.ptx
        assert is_cubin(compiled.cubin)
        assert compiled.spilled_bytes <= may_spill()
        assert 0 < compiled.registers <= 96
        assert compiled.shared_bytes <= 48 << 10
        loads = re.findall(r"ld\.global\S*", compiled.ptx)
        assert loads, "nothing is loaded"
        assert all(".v4.b32" in load for load in loads), "a thread must load 16 bytes at once"


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", TARGETS)
def test_the_hand_off(capability: int, dtype: torch.dtype, mean: bool, folder: Path) -> None:
    compiled = compile_kernel(hand_off_of(dtype, mean), capability, folder)
    assert parameters_of(compiled.ptx, compiled.entry) == ["u64"]
    assert is_cubin(compiled.cubin)
    assert compiled.spilled_bytes == 0
    loads = re.findall(r"ld\.global\S*", compiled.ptx)
    of_the_table = [load for load in loads if ".v4.b32" not in load]
    assert len(of_the_table) == 3 + mean, "everything but the table's row is loaded 16 bytes at a time"
    assert len(loads) > len(of_the_table)


def test_the_same_is_compiled_once(tmp_path: Path) -> None:
    specialisation = cached_residual_layer_norm(64, torch.float32, 1e-5)
    first = compile_kernel(specialisation, 80, tmp_path)
    (file,) = tmp_path.iterdir()
    os.utime(file, (1, 1))
    assert compile_kernel(specialisation, 80, tmp_path) == first
    assert file.stat().st_mtime == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("specialisation", "capability"),
    [
        (cached_residual_layer_norm(64, torch.float32, 1e-6), 80),
        (cached_residual_layer_norm(128, torch.float32, 1e-5), 80),
        (cached_residual_layer_norm(64, torch.float16, 1e-5), 80),
        (cached_residual_layer_norm(64, torch.float32, 1e-5), 86),
        (dataclasses.replace(cached_residual_layer_norm(64, torch.float32, 1e-5), warps=2), 80),
    ],
    ids=["epsilon", "width", "dtype", "GPU", "warps"],
)
def test_another_is_compiled_anew(specialisation: Specialisation, capability: int, folder: Path) -> None:
    compile_kernel(cached_residual_layer_norm(64, torch.float32, 1e-5), 80, folder)
    before = set(folder.iterdir())
    compile_kernel(specialisation, capability, folder)
    assert len(set(folder.iterdir()) - before) == 1


def test_a_gpu_that_the_compiler_does_not_know(folder: Path) -> None:
    with pytest.raises(BuildError, match="for SM12"):
        compile_kernel(hand_off_of(torch.float16, True), 12, folder)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rows of 16 to 4096"):
        cached_residual_layer_norm(5000, torch.float16, 1e-5)


PTX = """.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 128
{
\tld.param.b64 %rd1, [kernel_param_0];
}
"""


def test_scratch_that_is_not_used_is_no_parameter() -> None:
    stripped = _without_scratch(PTX, "kernel", ["u64", "u32"])
    assert parameters_of(stripped, "kernel") == ["u64", "u32"]
    assert stripped.partition(")")[2] == PTX.partition(")")[2]


def test_scratch_that_is_used_stays_an_error() -> None:
    with pytest.raises(BuildError, match="reads its scratch memory, kernel_param_2"):
        _without_scratch(PTX.replace("[kernel_param_0]", "[kernel_param_2]"), "kernel", ["u64", "u32"])


def test_parameters_that_are_not_the_arguments_are_an_error() -> None:
    with pytest.raises(BuildError, match="the parameters of kernel are not its arguments"):
        _without_scratch(PTX, "kernel", ["u64", "u64"])
    with pytest.raises(BuildError, match="no entry other"):
        parameters_of(PTX, "other")
