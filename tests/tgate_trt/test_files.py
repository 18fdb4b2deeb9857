"""Files are written whole or not at all, and safetensors are read a tensor at a time or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgate_trt import files
from tgate_trt.errors import InputError
from tgate_trt.files import (
    places_of,
    read_json,
    read_named,
    read_tensors,
    replace_file,
    replacing,
    shapes_of,
    weight_files,
    write_component,
)

TENSORS = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.arange(4.0), "three": torch.tensor([1, 2])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three tensors."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_equal(read: Iterator[tuple[str, Tensor]], names: list[str]) -> None:
    tensors = dict(read)
    assert list(tensors) == names
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in names)


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert (path.read_text(), partial.parent) == ("old", tmp_path), "in one folder, so that a rename suffices"
    replace_file(tmp_path / "other", "text")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "new", "other": "text"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*No such file.*the model is incomplete"), ("{", "is not JSON"), ("[1]", "holds no JSON object")],
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"{message}.*download"):
        read_json(tmp_path / "config.json")


def test_tensors_are_read_in_the_order_asked_for(path: Path) -> None:
    assert_equal(read_tensors([path], {"two": (4,), "one": (2, 3)}), ["two", "one"])
    assert_equal(read_named([path], {"three"}), ["three"])
    assert set(dict(read_named([path]))) == set(shapes_of([path])) == set(TENSORS)


@pytest.mark.parametrize(
    ("shapes", "message"), [({"four": (1,)}, "lacks the tensor 'four'"), ({"one": (3, 2)}, r"has shape \(2, 3\), but its config.json")]
)
def test_tensors_that_do_not_fit_are_refused(path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_tensors([path], shapes))


def test_places_are_those_of_the_bytes(path: Path) -> None:
    content = path.read_bytes()
    for name, place in places_of(path).items():
        data = bytearray(content[place.offset : place.offset + place.length])
        assert torch.equal(torch.frombuffer(data, dtype=TENSORS[name].dtype).reshape(place.shape), TENSORS[name])


@pytest.mark.parametrize("kept", [4, 40, -1], ids=["within the length", "within the header", "within the last tensor"])
def test_a_file_that_ends_early_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        places_of(path)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        list(read_named([path]))


@pytest.mark.parametrize("limit", [1 << 30, 30], ids=["one file", "shards"])
def test_a_component_is_read_back(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SHARD_BYTES", limit)
    write_component(tmp_path / "unet", "diffusion_pytorch_model", iter(TENSORS.items()), torch.float64)
    found = weight_files(tmp_path / "unet")
    assert len(found) == (1 if limit > 30 else 3)
    read = dict(read_named(found))
    assert {name: tensor.dtype for name, tensor in read.items()} == {"one": torch.float64, "two": torch.float64, "three": torch.int64}
    assert all(torch.equal(read[name], TENSORS[name].to(read[name].dtype)) for name in TENSORS)
    if limit == 30:
        index = json.loads((tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
        found[1].unlink()
        with pytest.raises(InputError, match=r"00002-of-00003.safetensors is missing, which .*index.json names"):
            weight_files(tmp_path / "unet")


def test_the_most_precise_variant_is_read(tmp_path: Path) -> None:
    for variant in (".fp16", "", ".bf16"):
        save_file(TENSORS, tmp_path / f"model{variant}.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(("name", "message"), [("model.bin", "pickled weights only"), ("readme", "holds no .safetensors weights")])
def test_a_folder_without_safetensors_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        weight_files(tmp_path)


def test_a_stamp_changes_with_the_file(path: Path) -> None:
    before, digest = files.stamp(path), files.sha256(path)
    files.link_or_copy(path, path.with_name("linked"))
    assert (files.stamp(path.with_name("linked")), files.sha256(path.with_name("linked"))) == (before, digest)
    replace_file(path, "other")
    assert files.stamp(path) != before
    assert files.sha256(path) != digest
