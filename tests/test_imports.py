"""Imports go one way through the rooms, and the package itself loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATION = {"errors", "specs", "models", "taps", "eager"}
"""Modules of `tgate_trt` on which every room may stand."""
ALLOWED = {
    "export": FOUNDATION | {"export"},
    "engines": FOUNDATION | {"engines", "kernels"},
    "kernels": FOUNDATION | {"kernels"},
    "tgate_trt": FOUNDATION | {"export", "engines", "kernels"},
}


def imports_of(path: Path) -> Iterator[str]:
    """Each name under ``tgate_trt`` that a file imports, such as ``specs`` or ``export.trace``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "tgate_trt":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("tgate_trt."):
                yield node.module.removeprefix("tgate_trt.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("tgate_trt.") for alias in node.names if alias.name.startswith("tgate_trt."))


@pytest.mark.parametrize("room", ["export", "engines", "kernels"])
def test_a_room_stands_on_the_foundation_only(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            assert name.partition(".")[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports tgate_trt.{name}"


def test_the_foundation_stands_on_itself() -> None:
    for name in FOUNDATION:
        for imported in imports_of(ROOT / "tgate_trt" / f"{name}.py"):
            allowed = FOUNDATION | {"model_source", "demo", "lora"}
            assert imported.partition(".")[0] in allowed, f"{name} imports tgate_trt.{imported}"


def test_nothing_imports_the_commands() -> None:
    for path in (ROOT / "tgate_trt").rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert not any(name.startswith("cli") for name in imports_of(path)), path


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnx_ir', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys, tgate_trt; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
