"""Engines are compared with eager PyTorch where they can run; where they cannot, the manifest says what they need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import Result

import tgate_trt
from tgate_trt.building.engine_verification import Task, verify, verify_engines
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.cli.inspect import app
from tgate_trt.engines.tensorrt_flavours import RTX, gpu_is_present
from tgate_trt.errors import StaleBundleError, VerificationError
from tgate_trt.files import sha256

Run = Callable[..., Result]
ErrorOf = Callable[..., str]

BOTH = ("onnxruntime", "pytorch")


@pytest.fixture(scope="module")
def bundle(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundle of `tiny_sdxl` with engines of both backends, built without verification. Read only."""
    return tgate_trt.build(tiny_sdxl, tmp_path_factory.mktemp("bundles") / "bundle", backend=BOTH, verify=False)


@pytest.fixture
def own(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of `bundle`, to change."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_a_build_compares_every_engine_that_runs_here(tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tgate_trt")
    manifest = tgate_trt.build(tiny_sd, tmp_path / "bundle", backend=BOTH, graphs=["fidelity"], components=False).manifest
    for engines in manifest.engines.values():
        assert set(engines.verification) == set(engines.files)
        for report in engines.verification.values():
            assert not isinstance(report, str)
            assert all(check["error"] <= report["tolerance"] == 1e-4 for check in report["checks"])
    taken = manifest.engines["pytorch"].verification["fidelity"]
    assert not isinstance(taken, str)
    assert {check["rows"] for check in taken["checks"]} == {1}, "its profile is one image"
    assert any(message.startswith("pytorch engine of fidelity agrees with eager PyTorch, fp32") for message in caplog.messages)
    tgate_trt.build(tiny_sd, tmp_path / "bundle", backend=BOTH, graphs=["fidelity"], components=False)
    assert any("is up to date" in message for message in caplog.messages)


def test_an_engine_that_computes_something_else_is_refused(own: Bundle, error_of: ErrorOf) -> None:
    """Each backend's engine takes the weights from another place; where one has other weights, that one alone is refused."""
    graph = ir.load(own.folder / "planning.onnx")
    for initializer in graph.graph.initializers.values():
        if initializer.name == "conv_out.bias":
            initializer.const_value = ir.tensor(np.asarray(initializer.const_value) + 1, name=initializer.name)
    ir.save(graph, own.folder / "planning.onnx")
    edit(own.folder, lambda manifest: manifest["files"]["planning.onnx"].update(held(own.folder / "planning.onnx")))
    with pytest.raises(VerificationError, match=r"the onnxruntime engine of planning differs from eager PyTorch: .* in 'noise_pred'"):
        verify(Task(own.folder, {"planning": ("onnxruntime",)}))
    assert verify(Task(own.folder, {"planning": ("pytorch",)}))["planning"]["pytorch"]
    before = (own.folder / MANIFEST).read_bytes()
    assert "the onnxruntime engine of planning differs" in error_of(app, own.folder, "--verify")
    assert (own.folder / MANIFEST).read_bytes() == before


def test_it_is_done_later_too_and_kept(own: Bundle, run: Run) -> None:
    assert "pytorch engines not verified (fidelity, planning): run tgate-inspect --verify" in flat(run(app, own.folder).stdout)
    done = run(app, own.folder, "--verify")
    assert done.exit_code == 0, done.output
    for text in (flat(done.stdout), flat(run(app, own.folder).stdout)):
        assert "pytorch engines against eager: planning " in text
        assert "not verified (fidelity" not in text
    verified = Bundle.open(own.folder).manifest.engines
    assert {backend: set(engines.verification) for backend, engines in verified.items()} == {
        backend: set(engines.files) for backend, engines in verified.items()
    }
    assert verified == verify_engines(Bundle.open(own.folder)), "what was verified is not verified again"


@pytest.mark.skipif(not RTX.is_installed() or gpu_is_present(), reason="takes tensorrt-rtx, and no GPU")
def test_engines_for_another_machine_name_what_they_need(tiny_sd: Path, tmp_path: Path, run: Run) -> None:
    backend = {"backend": "tensorrt-rtx", "precision": "fp32", "components": False}
    engines = tgate_trt.build(tiny_sd, tmp_path / "bundle", **backend, compute_capability=["SM89"]).manifest.engines["tensorrt-rtx"]
    assert engines.verification == dict.fromkeys(("planning", "fidelity"), "needs another machine: there is no NVIDIA GPU here")
    shown = flat(run(app, tmp_path / "bundle").stdout)
    assert "tensorrt-rtx engines not verified (fidelity, planning): needs another machine: there is no NVIDIA GPU here" in shown


@pytest.mark.skipif(not RTX.is_installed(), reason="takes tensorrt-rtx")
def test_without_weights_there_is_nothing_to_compare_with(tiny_sd: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "precision": "fp32", "components": False, "verify": False}
    bundle = tgate_trt.build(tiny_sd, tmp_path / "bundle", **options, compute_capability=["SM89"], discard_graphs=True)
    with pytest.raises(StaleBundleError, match="holds no weights of the denoiser; build it again without --discard-graphs"):
        verify(Task(bundle.folder, {"planning": ("tensorrt-rtx",)}))


@pytest.mark.skipif(not RTX.is_installed(), reason="takes tensorrt-rtx")
def test_shared_weights_bring_the_vanilla_engine(tiny_sd: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "tensorrt-rtx", "precision": "fp32", "components": False, "verify": False}
    bundle = tgate_trt.build(tiny_sd, tmp_path / "bundle", **options, compute_capability=["SM89"], weights="shared")
    assert set(bundle.manifest.engines["tensorrt-rtx"].files) == {"planning", "fidelity", "vanilla"}


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a bundle's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def held(file: Path) -> dict[str, Any]:
    """What a manifest keeps of a file."""
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def flat(text: str) -> str:
    """Printed text without its line breaks."""
    return " ".join(text.split())
