"""The options of `build`, `load` and `apply` are said once, and the commands pass them on by name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import tgate_trt
from tgate_trt.building.request import BuildOptions
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.build import build as command
from tgate_trt.engines.tensorrt_builder import PlanOptions
from tgate_trt.running.pipeline import LoadOptions


@pytest.mark.parametrize(("function", "options"), [(tgate_trt.build, BuildOptions), (tgate_trt.load, LoadOptions)])
def test_every_option_is_in_the_docstring(function: Any, options: type) -> None:
    assert all(f"``{name}``" in function.__doc__ for name in options.__annotations__)


def test_tgate_build_has_an_option_for_every_keyword_and_none_besides() -> None:
    plans = {field.name for field in dataclasses.fields(PlanOptions)} - {"capabilities"}
    others = {"context", "model", "output", "verbose"}
    assert set(inspect.signature(command).parameters) - others - plans == set(BuildOptions.__annotations__) - {"plan_options"}
    assert plans <= set(inspect.signature(command).parameters)


def test_a_keyword_that_is_no_option_is_refused(sd_bundle: Bundle, tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="there is no option 'precison'; the options are backend, precision,"):
        tgate_trt.build("shapes", tmp_path / "bundle", precison="fp16")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="there is no option 'gates'; the options are gate, gate_step,"):
        tgate_trt.load(sd_bundle, gates=3)  # type: ignore[call-arg]
    assert not (tmp_path / "bundle").exists()
