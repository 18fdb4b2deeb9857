"""Imports go one way through the rooms, in no circle, and the package itself loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"tgate_trt": ROOT / "tgate_trt"} | {f"tgate_trt.{room}": ROOT / room for room in ("export", "engines", "kernels")}
"""The folder of each package that setuptools maps, by its name when installed."""

FOUNDATION = ("errors", "specs", "taps", "eager", "files", "children", "console", "ip_adapter")
"""Modules of `tgate_trt` on which every room may stand."""

ORDER: tuple[tuple[str, ...], ...] = (
    FOUNDATION,
    ("kernels", "export", "models"),
    ("engines",),
    ("gate",),
    ("bundle",),
    ("running",),
    ("building",),
    ("demo",),
    ("analysis", "serve"),
    ("bench",),
    ("cli",),
)
"""Rooms from the ground up. A room imports rooms of the lines above its own, never one beside it."""

LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the four folders, by the name under which it is installed."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports_of(path: Path) -> Iterator[str]:
    """Each module of the package that a file imports anywhere: at its top, inside a function, or for its types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                if name in MODULES:
                    yield name
                elif module in MODULES and module != "tgate_trt":
                    yield module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


IMPORTS = {module: set(imports_of(path)) - {module} for module, path in MODULES.items() if module != "tgate_trt"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in IMPORTS} == set(LEVELS)


@pytest.mark.parametrize("room", LEVELS)
def test_a_room_stands_on_the_rooms_below_it(room: str) -> None:
    for module, imported in IMPORTS.items():
        if room_of(module) != room:
            continue
        for name in imported - {"tgate_trt"}:
            other = room_of(name)
            assert other == room or {room, other} <= set(FOUNDATION) or LEVELS[other] < LEVELS[room], f"{module} imports {name}"


def test_no_import_goes_in_a_circle() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnx_ir', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys, tgate_trt; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
