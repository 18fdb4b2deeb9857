"""The wheel holds what the source does, and the public API is what it is said to be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tgate_trt

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_public_api() -> None:
    assert sorted(tgate_trt.__all__) == [
        "BuildError",
        "Bundle",
        "BundleError",
        "Gate",
        "GateError",
        "GateSchedule",
        "GatedDenoiser",
        "InputError",
        "StaleBundleError",
        "TGateError",
        "UnsupportedError",
        "VerificationError",
        "apply",
        "build",
        "load",
        "refit",
        "remove",
    ]
    for name in tgate_trt.__all__:
        assert callable(getattr(tgate_trt, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tgate_trt.nothing


def test_the_readme_installs_what_there_is() -> None:
    readme, project = (ROOT / "README.md").read_text(encoding="utf-8"), PYPROJECT["project"]
    assert f"dist/{project['name'].replace('-', '_')}-{project['version']}-py3-none-any.whl" in readme
    assert f"CPython {project['requires-python'].removeprefix('>=')} or newer" in readme
    for extra in re.findall(r"'\.\[(\w+)\]'", readme):
        assert extra in project["optional-dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel, built from a copy: setuptools writes beside the source, and packs what an earlier build left there."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tgate_trt", "export", "engines", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    mapping = {"export": "tgate_trt/export", "engines": "tgate_trt/engines", "kernels": "tgate_trt/kernels", "tgate_trt": "tgate_trt"}
    expected = set()
    for room, place in mapping.items():
        expected |= {f"{place}/{path.relative_to(ROOT / room)}" for path in (ROOT / room).rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == expected


def test_the_wheel_holds_the_data(wheel: set[str]) -> None:
    data = [*(ROOT / "tgate_trt/configs").rglob("*.json"), *(path for path in (ROOT / "tgate_trt/demo/model").rglob("*") if path.is_file())]
    data += (ROOT / "tgate_trt/serve/page").iterdir()
    assert data
    assert {str(path.relative_to(ROOT)) for path in data} | {"tgate_trt/py.typed"} <= wheel


def test_packages_are_listed(wheel: set[str]) -> None:
    packages = {str(Path(name).parent).replace("/", ".") for name in wheel if name.endswith("/__init__.py")}
    assert packages == set(PYPROJECT["tool"]["setuptools"]["packages"])
