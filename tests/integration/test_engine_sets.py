"""TensorRT-RTX engines in bundles, built without a GPU: added without a new trace, reused, and never mistaken for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tgate_trt
from tgate_trt.building.staleness import state_of
from tgate_trt.bundle.backends import why_not
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.engines.tensorrt_builder import PlanOptions
from tgate_trt.engines.tensorrt_flavours import RTX, gpu_is_present
from tgate_trt.errors import BundleError, InputError, StaleBundleError, UnsupportedError
from tgate_trt.running import pipeline

pytestmark = pytest.mark.skipif(not RTX.is_installed(), reason="tensorrt-rtx is not installed here")

RTX_ONLY = {"backend": "tensorrt-rtx", "precision": "fp32", "verify": False, "components": False}


@pytest.fixture(scope="module")
def other_checkpoint(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_sd` with other weights of the UNet."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_sd, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path, other_checkpoint: Path) -> Path:
    """A folder with two bundles: ``baked``, with engines of ONNX Runtime and baked ones of TensorRT-RTX for two GPUs, and
    ``other`` of `other_checkpoint`, with ONNX Runtime's. Read only.
    """
    folder = tmp_path_factory.mktemp("bundles")
    tgate_trt.build(
        tiny_sd,
        folder / "baked",
        backend=["onnxruntime", "tensorrt-rtx"],
        compute_capability=["SM86", "SM89"],
        verify=False,
        components=False,
    )
    tgate_trt.build(other_checkpoint, folder / "other", verify=False, components=False)
    return folder


@pytest.fixture
def own_bundles(bundles: Path, tmp_path: Path) -> Path:
    """A copy of `bundles`, to change."""
    shutil.copytree(bundles, tmp_path / "bundles")
    return tmp_path / "bundles"


def test_the_manifest_says_what_plans_were_built_for(bundles: Path) -> None:
    bundle = Bundle.open(bundles / "baked")
    engines = bundle.manifest.engines["tensorrt-rtx"]
    assert dict(engines.files) == {"planning": "planning.tensorrt-rtx.plan", "fidelity": "fidelity.tensorrt-rtx.plan"}
    assert engines.options["capabilities"] == ["SM86", "SM89"]
    assert engines.options["weights"] == "baked"
    assert engines.built_with == {"tensorrt-rtx": RTX.version()}
    assert set(engines.files.values()) <= set(bundle.manifest.files)
    assert bundle.manifest.engines["onnxruntime"].files == {"planning": "planning.onnx", "fidelity": "fidelity.onnx"}
    assert {path.name for path in bundles.iterdir()} == {"baked", "other", ".tgate-trt"}
    assert {path.name for path in (bundles / ".tgate-trt" / "logs").iterdir()} == {
        f"baked.{graph}.tensorrt-rtx.log" for graph in ("planning", "fidelity")
    }


@pytest.mark.skipif(gpu_is_present(), reason="there is a GPU here")
def test_it_is_said_why_plans_do_not_run_here(bundles: Path) -> None:
    bundle = Bundle.open(bundles / "baked")
    assert "its tensorrt-rtx engines do not run here: there is no NVIDIA GPU here" in state_of(bundle).remarks
    assert why_not("tensorrt-rtx", bundle.manifest.engines["tensorrt-rtx"]) == "there is no NVIDIA GPU here"
    with pytest.raises(StaleBundleError, match=r"\(tensorrt-rtx: there is no NVIDIA GPU here\); add one with tgate-build"):
        pipeline.load(bundle, backend="tensorrt-rtx")
    assert pipeline.load(bundle, threads=1), "ONNX Runtime's engines run"


def test_a_backend_is_added_without_a_new_trace(own_bundles: Path, tiny_sd: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = Bundle.open(own_bundles / "baked").manifest
    caplog.set_level("INFO", "tgate_trt")
    after = tgate_trt.build(tiny_sd, own_bundles / "baked", **RTX_ONLY, compute_capability=["SM89"]).manifest
    assert "adding to the bundle: tensorrt-rtx's capabilities: SM86, SM89 before, SM89 now" in caplog.messages
    assert not any("trace" in message and "done" in message for message in caplog.messages)
    assert after.engines["tensorrt-rtx"].options["capabilities"] == ["SM89"]
    assert after.engines["onnxruntime"] == before.engines["onnxruntime"]
    assert after.files["trace.onnx"] == before.files["trace.onnx"]


def test_a_graph_that_is_added_gets_engines_of_every_backend(own_bundles: Path) -> None:
    from tgate_trt.building.builder import add_graph

    extended = add_graph(Bundle.open(own_bundles / "baked"), "vanilla")
    for engines in extended.manifest.engines.values():
        assert set(engines.files) == {"planning", "fidelity", "vanilla"}
    assert set(extended.manifest.engines["tensorrt-rtx"].keys) == {"planning", "fidelity", "vanilla"}


@pytest.mark.parametrize(("weights", "reused"), [("baked", False), ("shared-linear", False), ("shared", True)])
def test_engines_without_weights_serve_another_checkpoint(
    weights: str, reused: bool, own_bundles: Path, tiny_sd: Path, other_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tgate_trt.build(tiny_sd, own_bundles / "baked", **RTX_ONLY, weights=weights).manifest
    caplog.set_level("INFO", "tgate_trt")
    second = tgate_trt.build(other_checkpoint, own_bundles / "other", **RTX_ONLY, weights=weights).manifest
    files = first.engines["tensorrt-rtx"].files.values()
    assert second.files["weights.safetensors"] != first.files["weights.safetensors"]
    assert [first.files[file] == second.files[file] for file in files] == [reused] * len(files)
    assert sum(f"reused from {own_bundles / 'baked'}" in message for message in caplog.messages) == len(files) * reused


def test_an_engine_that_is_not_whole_is_not_reused(
    own_bundles: Path, tiny_sd: Path, other_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tgate_trt.build(tiny_sd, own_bundles / "baked", **RTX_ONLY, weights="shared")
    foreign(own_bundles / "baked" / "fidelity.tensorrt-rtx.plan", own_bundles)
    caplog.set_level("INFO", "tgate_trt")
    tgate_trt.build(other_checkpoint, own_bundles / "other", **RTX_ONLY, weights="shared")
    reused = [message for message in caplog.messages if "reused" in message]
    assert len(reused) == 2 and not any("fidelity" in message for message in reused)


def test_graphs_are_discarded_and_a_new_build_says_why(own_bundles: Path, tiny_sd: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tgate_trt.building.builder import add_graph

    bundle = own_bundles / "baked"
    without_onnxruntime = json.loads((bundle / MANIFEST).read_text())
    del without_onnxruntime["engines"]["onnxruntime"]
    (bundle / MANIFEST).write_text(json.dumps(without_onnxruntime))
    same = {**RTX_ONLY, "compute_capability": ["SM86", "SM89"]}
    caplog.set_level("INFO", "tgate_trt")
    discarded = tgate_trt.build(tiny_sd, bundle, **same, discard_graphs=True)
    assert not [*bundle.glob("*.onnx"), *bundle.glob("*.safetensors")]
    assert set(discarded.manifest.files) >= set(discarded.manifest.engines["tensorrt-rtx"].files.values())
    tgate_trt.build(tiny_sd, bundle, **same, discard_graphs=True)
    assert any("is up to date" in message for message in caplog.messages)
    with pytest.raises(StaleBundleError, match="holds no graphs to add to"):
        add_graph(discarded, "vanilla")
    tgate_trt.build(tiny_sd, bundle, **same)
    assert any("building again: its graphs were discarded" in message for message in caplog.messages)
    assert sum("reused from" in message for message in caplog.messages) == 2, "the graphs are the same again"


def cut_off(plan: Path, manifest: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])


def foreign(plan: Path, manifest: Path) -> None:
    """Another plan of the same size."""
    plan.write_bytes(plan.read_bytes()[::-1])


def unlisted(plan: Path, manifest: Path) -> None:
    data = json.loads(manifest.read_text())
    del data["files"][plan.name]
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "bytes instead of"),
        (foreign, r"is not what was built \(its sha256 differs\)"),
        (unlisted, "names planning.tensorrt-rtx.plan and has no hash of it"),
    ],
)
def test_a_damaged_plan_is_refused_before_use(damage: object, message: str, own_bundles: Path) -> None:
    bundle = own_bundles / "baked"
    damage(bundle / "planning.tensorrt-rtx.plan", bundle / MANIFEST)  # type: ignore[operator]
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"weights": "melted"}, InputError, "--weights is one of baked, shared, shared-linear, got 'melted'"),
        ({"backend": "onnxruntime", "compute_capability": ["SM89"]}, InputError, "are for --backend tensorrt-rtx and tensorrt"),
        ({"weights": "shared", "discard_graphs": True}, InputError, "for TensorRT engines with --weights baked alone"),
        ({"compute_capability": ["SM90"]}, InputError, "does not build for 'SM90'"),
        ({"plan_options": PlanOptions(optimization_level=9)}, InputError, "a number from 0 to 5, got 9"),
        pytest.param(
            {"plan_options": PlanOptions(refittable=True)},
            UnsupportedError,
            "only where there is a GPU",
            marks=pytest.mark.skipif(gpu_is_present(), reason="there is a GPU here"),
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_trace(
    arguments: dict[str, object], kind: type[Exception], message: str, tiny_sd: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        tgate_trt.build(tiny_sd, tmp_path / "bundle", **{**RTX_ONLY, **arguments})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
