"""Bundles on disk: whole or not at all, and one sentence for each thing that can be wrong with one."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tgate_trt.building.staleness import state_of
from tgate_trt.bundle.backends import why_not
from tgate_trt.bundle.bundle import Bundle, describe_files, write_manifest
from tgate_trt.bundle.folder import building, locked
from tgate_trt.bundle.manifest import MANIFEST, SCHEMA, STAMPS, BuiltFor, BuiltFrom, Check, EngineOptions, EngineSet, Manifest, Report
from tgate_trt.errors import BuildError, BundleError, InputError
from tgate_trt.files import sha256
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

SPEC = GraphSpec("planning", (TensorSpec("sample", "float32", ("batch", 4)),), (), {"batch": Bounds(1, 2, 2)})
MANIFEST_OF_A_BUNDLE = Manifest(
    model=BuiltFrom(
        "m", ModelReference("m", random_seed=0), "unet", 77, ("vae_decoder",), {"content": "c", "files": {}, "seed": 0, "revision": None}
    ),
    built_for=BuiltFor("fp32", Bounds(8, 8, 8), Bounds(8, 8, 8), Bounds(1, 1, 1), True, Bounds(1, 77, 231)),
    built_with={},
    signature=SPEC,
    graphs={"planning": SPEC},
    engines={},
    verification={},
    gate_step=0.4,
    gate_noise=1.35,
    steps=25,
    guidance_scale=None,
)


OPTIONS: Any = {
    "weights": "baked",
    "gpu": None,
    "capabilities": ["SM89"],
    "optimization_level": None,
    "workspace": None,
    "version_compatible": False,
    "hardware_compatible": False,
    "refittable": False,
    "stripped": False,
}


def write(folder: Path, content: bytes = b"graph") -> None:
    """Write a bundle of one graph and one file of the pipeline."""
    (folder / "planning.onnx").write_bytes(content)
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "model_index.json").write_text("{}")
    write_manifest(folder, dataclasses.replace(MANIFEST_OF_A_BUNDLE, files=describe_files(folder)))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A whole bundle."""
    with building(tmp_path / "bundle") as folder:
        write(folder)
    return tmp_path / "bundle"


def test_a_bundle_opens_as_it_was_written(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert dataclasses.replace(opened.manifest, files={}) == MANIFEST_OF_A_BUNDLE
    assert opened.graph("planning") == SPEC
    assert opened.manifest.built_for.batch_size == Bounds(1, 1, 1)
    assert not list(bundle.parent.glob(".bundle*")), "nothing is left beside it"


def alter(bundle: Path) -> None:
    (bundle / "planning.onnx").write_bytes(b"grasp")


def truncate(bundle: Path) -> None:
    (bundle / "planning.onnx").write_bytes(b"gra")


def delete(bundle: Path) -> None:
    (bundle / "planning.onnx").unlink()


def add(bundle: Path) -> None:
    (bundle / "pipeline" / "pytorch_model.bin").write_bytes(b"pickle")


def link(bundle: Path) -> None:
    (bundle / "planning.onnx").rename(bundle.parent / "elsewhere")
    (bundle / "planning.onnx").symlink_to(bundle.parent / "elsewhere")


def edit(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, **changes}))


def engine_elsewhere(bundle: Path) -> None:
    edit(bundle, engines={"onnxruntime": {"files": {"planning": "../other/planning.onnx"}}})


def engine_at_the_root(bundle: Path) -> None:
    edit(bundle, engines={"onnxruntime": {"files": {"planning": "/etc/planning.onnx"}}})


def engine_without_a_hash(bundle: Path) -> None:
    edit(bundle, engines={"onnxruntime": {"files": {"planning": "fidelity.onnx"}}})


def lora_elsewhere(bundle: Path) -> None:
    edit(bundle, lora=[{"file": "lora/../../style.safetensors", "scale": 1, "name": "style"}])


def lora_without_a_hash(bundle: Path) -> None:
    edit(bundle, lora=[{"file": "lora/0.safetensors", "scale": 1, "name": "style"}])


def file_elsewhere(bundle: Path) -> None:
    edit(bundle, files={"../other/weights.safetensors": {"size": 1, "sha256": "0"}})


def shards_elsewhere(bundle: Path) -> None:
    index = bundle / "pipeline" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "../../other.safetensors"}}))
    edit(bundle, files={name: vars(held) for name, held in describe_files(bundle).items()})


def no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()


def broken_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"schema": 1,')


def foreign_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"name": "an extension of a browser"}')


def old_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"schema": 0}')


def short_manifest(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    del data["engines"]
    (bundle / MANIFEST).write_text(json.dumps(data))


def odd_manifest(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, "graphs": []}))


DAMAGE = {
    alter: r"planning\.onnx is not what was built \(its sha256 differs\)",
    truncate: r"planning\.onnx has 3 bytes instead of 5",
    delete: r"planning\.onnx is missing",
    add: r"pipeline/pytorch_model\.bin is not part of this bundle",
    link: r"planning\.onnx is a link out of the bundle; put the file itself there",
    engine_elsewhere: r"'\.\./other/planning\.onnx' is not a path in the bundle",
    engine_at_the_root: r"'/etc/planning\.onnx' is not a path in the bundle",
    engine_without_a_hash: r"names fidelity\.onnx and has no hash of it",
    lora_elsewhere: r"is not a path in the bundle",
    lora_without_a_hash: r"names lora/0\.safetensors and has no hash of it",
    file_elsewhere: r"'\.\./other/weights\.safetensors' is not a path in the bundle",
    shards_elsewhere: r"names '\.\./\.\./other\.safetensors', which is not in its folder",
    no_manifest: r"has no manifest\.json",
    broken_manifest: r"manifest\.json cannot be read",
    foreign_manifest: r"not one of tgate-trt",
    old_manifest: rf"schema version 0, this version reads {SCHEMA}",
    short_manifest: r"engines: Field required",
    odd_manifest: rf"not in the form of schema {SCHEMA}",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_told_in_one_sentence(bundle: Path, damage: object) -> None:
    assert callable(damage)
    damage(bundle)
    with pytest.raises(BundleError, match=DAMAGE[damage]) as caught:
        Bundle.open(bundle)
    assert str(caught.value).startswith(str(bundle)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gate_step", "gate_noise", "expected"), [(0.4, 1.35, "noise:1.35"), (0.4, None, 0.4), (None, None, 0.4), (0.6, 20300.0, "noise:20300")]
)
def test_the_default_gate_is_a_noise_level_else_a_step(gate_step: Any, gate_noise: float | None, expected: Any) -> None:
    manifest = dataclasses.replace(MANIFEST_OF_A_BUNDLE, gate_step=gate_step, gate_noise=gate_noise)
    assert manifest.default_gate_step == expected
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))).default_gate_step == expected


def test_a_missing_bundle_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder; build a bundle with tgate-build"):
        Bundle.open(tmp_path / "nothing")


def test_stamps_save_hashing_and_full_does_not_trust_them(bundle: Path) -> None:
    path = bundle / "planning.onnx"
    status = path.stat()
    path.write_bytes(b"grasp")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    Bundle.open(bundle)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle, full=True)


def test_a_copied_bundle_is_hashed_once_and_stamped(bundle: Path) -> None:
    (bundle / STAMPS).write_text("not json")
    Bundle.open(bundle)
    stamps = json.loads((bundle / STAMPS).read_text())
    assert set(stamps) == {"planning.onnx", "pipeline/model_index.json"}


def test_a_failed_build_leaves_the_old_bundle_whole(bundle: Path) -> None:
    with pytest.raises(ZeroDivisionError), building(bundle) as folder:
        write(folder, b"other")
        _ = 1 / 0
    assert (bundle / "planning.onnx").read_bytes() == b"graph"
    assert not list(bundle.parent.glob(".bundle*"))


def test_a_new_build_takes_the_old_ones_place(bundle: Path) -> None:
    with building(bundle) as folder:
        write(folder, b"newer")
    assert (bundle / "planning.onnx").read_bytes() == b"newer"
    Bundle.open(bundle, full=True)
    assert not list(bundle.parent.glob(".bundle*"))


def test_left_overs_of_a_killed_build_are_removed(bundle: Path) -> None:
    (bundle.parent / ".bundle.building-999999999-x").mkdir()
    with building(bundle) as folder:
        write(folder)
    assert not list(bundle.parent.glob(".bundle*"))


def test_an_exchange_cut_off_between_two_renames_is_mended(bundle: Path) -> None:
    bundle.rename(bundle.parent / ".bundle.before")
    assert Bundle.open(bundle).manifest.steps == 25


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(InputError, match="exists and is not a bundle"), building(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos" / "cat.png").exists()


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"), building(tmp_path / "file" / "bundle"):
        pass


def test_a_graph_that_is_not_there_says_how_to_get_it(bundle: Path) -> None:
    with pytest.raises(BundleError, match="holds no fidelity graph; build it with --graphs planning,fidelity"):
        Bundle.open(bundle).graph("fidelity")


# Bundles that are shared


def test_links_within_the_bundle_are_followed(bundle: Path) -> None:
    (bundle / "pipeline" / "copy").symlink_to("model_index.json")
    files = {name: vars(held) for name, held in describe_files(bundle).items()}
    assert "pipeline/copy" in files
    edit(bundle, files=files)
    Bundle.open(bundle, full=True)


def snapshot_of(bundle: Path, cache: Path) -> Path:
    """A bundle as `huggingface_hub.snapshot_download` lays it: links to blobs, and what else a repository holds."""
    repository = cache / "models--someone--bundle"
    folder = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in bundle.rglob("*") if path.is_file() and path.name != STAMPS]:
        blob = repository / "blobs" / sha256(path)
        blob.write_bytes(path.read_bytes())
        link = folder / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for name in (".gitattributes", "README.md"):
        (folder / name).write_text("of the repository")
    return folder


def test_a_snapshot_of_the_hub_opens(bundle: Path, tmp_path: Path) -> None:
    folder = snapshot_of(bundle, tmp_path / "hub")
    assert Bundle.open(folder, full=True).manifest == Bundle.open(bundle).manifest


def test_a_damaged_blob_is_seen_through_its_link(bundle: Path, tmp_path: Path) -> None:
    folder = snapshot_of(bundle, tmp_path / "hub")
    (folder / "planning.onnx").resolve().write_bytes(b"grasp")
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(folder)


def test_a_clone_of_a_repository_opens_and_keeps_what_is_the_repositorys(bundle: Path) -> None:
    (bundle / ".git" / "objects").mkdir(parents=True)
    (bundle / ".git" / "objects" / "pack").write_bytes(b"history")
    (bundle / "README.md").write_text("about it")
    Bundle.open(bundle, full=True)
    with locked(bundle), building(bundle) as folder:
        write(folder, b"newer")
    assert (bundle / ".git" / "objects" / "pack").read_bytes() == b"history" and (bundle / "README.md").exists()
    assert Bundle.open(bundle).manifest.files["planning.onnx"].size == len(b"newer")


# Manifests with wrong types inside


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of JSON data."""
    if path:
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


@pytest.mark.parametrize("wrong", [None, 3, -1, "text", [], {}, [3], {"key": 3}], ids=repr)
def test_any_value_of_another_type_is_one_sentence_or_harmless(wrong: Any, bundle: Path) -> None:
    engines = EngineSet({"planning": "planning.onnx"}, EngineOptions(**OPTIONS), {"tensorrt": "10"}, {"planning": "key"})
    report = Report(compared_with="eager", tolerance=1e-4, checks=[Check(rows=1, error=0.0)])
    manifest = dataclasses.replace(Bundle.open(bundle).manifest, engines={"tensorrt": engines}, verification={"planning": report})
    data = json.loads(json.dumps(manifest.to_json()))
    for path in places(data):
        broken = copy.deepcopy(data)
        target = broken
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = wrong
        (bundle / MANIFEST).write_text(json.dumps(broken))
        try:
            opened = Bundle.open(bundle)
            state_of(opened)
            for backend in opened.manifest.engines:
                why_not(backend, opened.manifest.engines[backend])
        except BundleError as error:
            assert "\n" not in str(error), path


# Places that cannot be exchanged, and builds beside each other


def test_a_build_into_the_working_directory_stays_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    inode = bundle.stat().st_ino
    with locked(Path()), building(Path()) as folder:
        write(folder, b"newer")
    assert Bundle.open(Path()).manifest.files["planning.onnx"].size == len(b"newer")
    assert bundle.stat().st_ino == inode
    assert sorted(path.name for path in bundle.iterdir()) == [STAMPS, MANIFEST, "pipeline", "planning.onnx"]


def test_a_mount_point_takes_a_build(tmp_path: Path) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", target], check=False, capture_output=True).returncode:
        pytest.skip("this process may not mount")
    try:
        for content in (b"first", b"second"):
            with locked(target), building(target) as folder:
                write(folder, content)
            assert (Bundle.open(target).folder / "planning.onnx").read_bytes() == content
        full = pytest.raises(BuildError, match=r"No space left on device; free some disk space, .* what was there before is whole")
        with full, locked(target), building(target) as folder:
            (folder / "weights").write_bytes(bytes(2 << 20))
        assert (Bundle.open(target).folder / "planning.onnx").read_bytes() == b"second"
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_full_disk_is_one_sentence(bundle: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "weights.safetensors"))

    with (
        pytest.raises(BuildError, match=r"weights\.safetensors: No space left on device; free some disk space"),
        building(bundle) as folder,
    ):
        fill(folder)
    Bundle.open(bundle)


def test_two_builds_of_one_place_come_one_after_the_other(bundle: Path) -> None:
    """The second waits: it neither removes the first one's folder nor exchanges it away."""
    order: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def build(name: str, content: bytes) -> None:
        with locked(bundle), building(bundle) as folder:
            order.append(f"{name} begins")
            inside.set()
            if name == "first":
                go_on.wait(10)
                assert folder.is_dir()
            write(folder, content)
            order.append(f"{name} ends")

    first = threading.Thread(target=build, args=("first", b"first"))
    first.start()
    inside.wait(10)
    second = threading.Thread(target=build, args=("second", b"second"))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    first.join(10)
    second.join(10)
    assert order == ["first begins", "first ends", "second begins", "second ends"]
    assert (bundle / "planning.onnx").read_bytes() == b"second"
