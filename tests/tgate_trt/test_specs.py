"""Specs read back what they write, and refuse what they should."""

from __future__ import annotations

import json

import pytest

from tgate_trt.errors import BundleError, InputError
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

SPEC = GraphSpec(
    "fidelity",
    (TensorSpec("sample", "float16", ("batch", 4, 8, 8)), TensorSpec("cache.cross_attention.mid", "float16", ("batch", 16, 32))),
    (TensorSpec("noise_pred", "float16", ("batch", 4, 8, 8)),),
    {"batch": Bounds(1, 2, 4)},
)


def test_a_spec_survives_json() -> None:
    assert GraphSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


def test_json_holds_min_opt_and_max_shapes() -> None:
    sample = SPEC.to_json()["inputs"][0]
    assert (sample["min"], sample["opt"], sample["max"]) == ([1, 4, 8, 8], [2, 4, 8, 8], [4, 4, 8, 8])


def test_cache_tensors_are_found() -> None:
    assert [tensor.name for tensor in SPEC.cache_inputs] == ["cache.cross_attention.mid"]
    assert SPEC.cache_outputs == ()


@pytest.mark.parametrize("data", [{}, {"inputs": 3}, {"outputs": [{}]}, {"dimensions": []}])
def test_other_json_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="are not described as this version expects"):
        GraphSpec.from_json({**SPEC.to_json(), **data} if data else {})


@pytest.mark.parametrize(("text", "bounds"), [("1:2:4", Bounds(1, 2, 4)), ("3", Bounds(3, 3, 3))])
def test_bounds_parse(text: str, bounds: Bounds) -> None:
    assert Bounds.parse(text) == bounds
    assert Bounds.parse(str(bounds)) == bounds


@pytest.mark.parametrize("text", ["", "0", "2:1:4", "1:2", "a:b:c", "-1", "1:2:3:4"])
def test_other_bounds_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        Bounds.parse(text)


def test_shapes_within_bounds() -> None:
    assert SPEC.shapes_within_bounds(SPEC.outputs[0]) == [(1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8)]
