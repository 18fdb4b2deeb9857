"""Bundles on disk: whole or not at all, and one sentence for each thing that can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from tgate_trt.bundle.bundle import Bundle, describe_files, write_manifest
from tgate_trt.bundle.folder import building
from tgate_trt.bundle.manifest import MANIFEST, SCHEMA, STAMPS, BuiltFor, BuiltFrom, Manifest
from tgate_trt.errors import BundleError, InputError
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

SPEC = GraphSpec("planning", (TensorSpec("sample", "float32", ("batch", 4)),), (), {"batch": Bounds(1, 2, 2)})
MANIFEST_OF_A_BUNDLE = Manifest(
    model=BuiltFrom("m", ModelReference("m", random_seed=0), "unet", 77, ("vae_decoder",), {"content": "c"}),
    built_for=BuiltFor("fp32", 8, 8, Bounds(1, 1, 1), fuse_cache_reuse=True),
    built_with={},
    graphs={"planning": SPEC},
    engines={},
    verification={},
    gate_step=0.4,
    steps=25,
    guidance_scale=None,
)


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
    link: r"planning\.onnx is missing",
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
