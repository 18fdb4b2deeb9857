"""Compile the kernels to PTX and cubin for any GPU, on a machine without one.

A compiled kernel takes its own arguments only. Triton's launcher passes two more pointers to scratch memory; no other launcher does,
so they are removed from the entry. The registers, shared memory and spills that `ptxas` reports are kept with the kernel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgate_trt.errors import BuildError, UnsupportedError
from tgate_trt.files import cache_folder, replace_file
from tgate_trt.kernels import cached_residual_layer_norm as norm
from tgate_trt.kernels import hand_off
from tgate_trt.kernels.language import DTYPES, HAS_TRITON, power_of_two, triton_dtype

TARGETS = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, for which the tests compile every kernel: Turing to Blackwell."""

ALIGNMENT = 16
"""Alignment in bytes of the pointers that a compiled kernel takes."""


@dataclass(frozen=True)
class Specialisation:
    """A kernel with the constants that it is compiled for, on any GPU."""

    kernel: Any
    arguments: Mapping[str, str]
    """Triton's type of each launch argument, in order, such as ``*fp16`` or ``i32``."""
    constants: Mapping[str, Any]
    warps: int
    owned: int
    """Rows that one program owns; the grid must cover all rows."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one GPU, and everything that a launch needs.

    The grid is ``[ceil(rows / owned), 1, 1]``, the block ``[32 · warps, 1, 1]``. Arguments are passed in the order of ``arguments``.
    """

    entry: str
    capability: int
    arguments: tuple[str, ...]
    owned: int
    warps: int
    shared_bytes: int
    """Dynamic shared memory of a block."""
    registers: int
    """Registers of a thread."""
    spilled_bytes: int
    """Bytes that a thread spills, stores and loads together."""
    ptx: str = dataclasses.field(repr=False)
    cubin: bytes = dataclasses.field(repr=False)


def cached_residual_layer_norm(width: int, dtype: torch.dtype, epsilon: float) -> Specialisation:
    """The fused reuse of the cache on dense rows. Its arguments are the inputs, the number of rows, and the outputs.

    Raises:
        UnsupportedError: if the kernel does not support the width or the dtype.
    """
    norm.check_takes(width, dtype)
    tile, pointer = norm.tile_of(width), f"*{DTYPES[dtype]}"
    arguments = dict.fromkeys(("hidden", "cache", "weight", "bias"), pointer) | {"rows": "i32", "residual": pointer, "normed": pointer}
    constants = {"hidden_stride": width, "cache_stride": width, "WIDTH": width, "EPSILON": epsilon}
    constants |= {"BLOCK_ROWS": tile.rows, "BLOCK_WIDTH": power_of_two(width)}
    return Specialisation(norm.cached_residual_layer_norm_kernel, arguments, constants, tile.warps, tile.rows)


def hand_off_of(dtype: torch.dtype, mean: bool) -> Specialisation:
    """The hand-off at the gate; its grid covers the rows of its table."""
    constants = {"DTYPE": triton_dtype(dtype), "MEAN": mean, "ALIGNED": ALIGNMENT, "BLOCK": hand_off.BLOCK}
    return Specialisation(hand_off.hand_off_kernel, {"table": "*i64"}, constants, hand_off.WARPS, 1)


def compile_kernel(specialisation: Specialisation, capability: int, folder: Path | None = None) -> CompiledKernel:
    """Compile a kernel, or read it from the cache if it was compiled before.

    Args:
        specialisation: of one of this package's kernels.
        capability: the GPU's compute capability times ten, such as 89.
        folder: the cache; ``tgate-trt/kernels`` in the user's cache folder if None.

    Raises:
        UnsupportedError: if Triton is not installed.
        BuildError: if the compiler fails, or the kernel needs scratch memory, which only Triton's own launcher provides.
    """
    if not HAS_TRITON:
        raise UnsupportedError("compiling the kernels needs Triton; install it with `pip install triton` (Linux)")
    folder = folder or cache_folder("kernels")
    path = folder / f"{_key(specialisation, capability)}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return CompiledKernel(**{**kept, "arguments": tuple(kept["arguments"]), "cubin": bytes.fromhex(kept["cubin"])})
    compiled = _compile(specialisation, capability)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({**dataclasses.asdict(compiled), "cubin": compiled.cubin.hex()}))
    return compiled


def parameters_of(ptx: str, entry: str) -> list[str]:
    """The types of an entry's parameters, in order, such as ``u64`` for a pointer and ``u32`` for an integer.

    Raises:
        BuildError: if the PTX has no such entry.
    """
    return [_PARAMETER.findall(parameter)[0][0] for parameter in _parameters(ptx, entry)]


_PTX_TYPES = {"*": "u64", "i": "u32"}
"""By the first letter of Triton's type."""
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*$")


def _compile(specialisation: Specialisation, capability: int) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, constants = specialisation.kernel, specialisation.arguments, specialisation.constants
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", ALIGNMENT]] for place, name in enumerate(kernel.arg_names) if arguments.get(name, "").startswith("*")
    }
    options = {"num_warps": specialisation.warps, "ptx_version": _ptx_version(capability), "enable_fp_fusion": True}
    try:
        built = triton.compile(
            ASTSource(kernel, signature, dict(constants), aligned), target=GPUTarget("cuda", capability, 32), options=options
        )
    except Exception as error:
        raise BuildError(f"Triton cannot compile {kernel.__name__} for SM{capability}: {_first_line(error)}") from error
    if built.metadata.global_scratch_size or built.metadata.profile_scratch_size:
        raise BuildError(f"{kernel.__name__} needs scratch memory, which only Triton's own launcher provides; please report it")
    entry = built.metadata.name
    ptx = _without_scratch(built.asm["ptx"], entry, [_PTX_TYPES[type_[0]] for type_ in arguments.values()])
    cubin, report = _assemble(ptx, capability)
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill", report)
    if registers is None or not spilled:
        raise BuildError(f"ptxas must report the registers and spills of {entry}, got {report!r}; please report it")
    shared_bytes, spilled_bytes = built.metadata.shared, sum(map(int, spilled))
    owned, warps = specialisation.owned, specialisation.warps
    types = tuple(arguments.values())
    return CompiledKernel(entry, capability, types, owned, warps, shared_bytes, int(registers[1]), spilled_bytes, ptx, cubin)


def _ptx_version(capability: int) -> int:
    """A PTX version of CUDA 12.0, 12.8 or 12.9: about the oldest with this GPU, so that older drivers load it too."""
    if capability < 100:
        return 80
    return 87 if capability in (100, 120) else 88


def _parameters(ptx: str, entry: str) -> list[str]:
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(([^)]*)\)", ptx)
    if found is None:
        raise BuildError(f"the PTX has no entry {entry}")
    return [parameter.strip() for parameter in found[1].split(",")]


def _without_scratch(ptx: str, entry: str, expected: list[str]) -> str:
    """Remove the parameters that follow the kernel's arguments: pointers to scratch memory, which it must not use.

    Raises:
        BuildError: if the first parameters are not the arguments, or the kernel reads one of the others.
    """
    parameters = _parameters(ptx, entry)
    kept, dropped = parameters[: len(expected)], parameters[len(expected) :]
    if parameters_of(ptx, entry)[: len(expected)] != expected:
        raise BuildError(f"the parameters of {entry} are not its arguments: {parameters}")
    for parameter in dropped:
        ((_, name),) = _PARAMETER.findall(parameter)
        if len(re.findall(rf"\b{name}\b", ptx)) > 1:
            raise BuildError(f"{entry} reads its scratch memory, {name}")
    listed = "(\n\t" + ",\n\t".join(kept) + "\n)"
    return re.sub(rf"(\.entry\s+{re.escape(entry)}\s*)\([^)]*\)", lambda found: found[1] + listed, ptx)


def _assemble(ptx: str, capability: int) -> tuple[bytes, str]:
    """The cubin, and the report of ptxas.

    Raises:
        BuildError: if ptxas fails.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"ptxas cannot assemble for {target[1]}: {_first_line(done.stderr)}")
        return result.read_bytes(), done.stderr


def _key(specialisation: Specialisation, capability: int) -> str:
    """Hash of everything that determines the binary: source, specialisation, GPU and compiler."""
    import triton

    parts = {
        "source": specialisation.kernel.cache_key,
        "arguments": dict(specialisation.arguments),
        "constants": {name: str(value) for name, value in specialisation.constants.items()},
        "warps": specialisation.warps,
        "owned": specialisation.owned,
        "capability": capability,
        "triton": triton.__version__,
        "this": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
