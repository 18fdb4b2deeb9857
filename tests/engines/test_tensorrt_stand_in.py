"""The stand-in offers what TensorRT and TensorRT-RTX offer, under the same names, and refuses what they refuse."""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .conftest import StandIn
from .stand_in import tensorrt as stand_in_module
from .stand_in.cuda import NOT_PERMITTED, Cuda, Race

STUBS = Path(__file__).parents[2] / ".typing" / "full" / "tensorrt_bindings" / "tensorrt.pyi"


def offered(is_rtx: bool) -> Iterator[tuple[str, str, Any]]:
    """Class, name and value of everything public that the stand-in offers."""
    made: ModuleType = stand_in_module.module("offered", Cuda(), is_rtx=is_rtx)
    for name, found in vars(made).items():
        if not isinstance(found, type):
            continue
        if issubclass(found, enum.Enum):
            yield from ((name, member, None) for member in found.__members__)
            continue
        members = {member: value for parent in reversed(found.__mro__[:-1]) for member, value in vars(parent).items()}
        for member, value in members.items():
            if (member == "__init__" and "__init__" in vars(found.__mro__[-2])) or not member.startswith("_"):
                yield name, member, value


# Attributes of the stand-in that its tests read, which are no part of TensorRT.
_OWN = {"product", "runs", "specialised", "own_graphs"}
# Made by TensorRT alone, never by its caller, so their constructors are nobody's API.
_NOT_CONSTRUCTED = {"ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"}


def is_api(name: str, member: str) -> bool:
    return member not in _OWN and not (member == "__init__" and name in _NOT_CONSTRUCTED)


def parameters(value: Any) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


def test_every_name_and_parameter_is_one_of_tensorrt_rtx() -> None:
    """By the signatures in the docstrings of its binding."""
    real = pytest.importorskip("tensorrt_rtx")
    compared = 0
    for name, member, value in offered(is_rtx=True):
        if not is_api(name, member):
            continue
        found = getattr(real, name)
        if value is None:
            assert member in found.__members__, f"{name}.{member}"
        elif member == "Severity":
            assert set(value.__members__) == set(found.Severity.__members__)
        else:
            real_member = inspect.getattr_static(found, member)
            assert isinstance(real_member, property) == isinstance(value, property), f"{name}.{member}"
            if not isinstance(value, property):
                assert parameters(value) in list(overloads(getattr(found, member).__doc__ or "", member)), f"{name}.{member}"
        compared += 1
    assert compared > 40


def test_attributes_that_are_set_are_those_of_tensorrt_rtx() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    made = stand_in_module.IRuntimeConfig(stand_in_module.Product(Cuda(), is_rtx=True))
    for name in vars(made):
        if not name.startswith("_"):
            assert isinstance(inspect.getattr_static(real.IRuntimeConfig, name), property), name


def overloads(text: str, name: str) -> Iterator[list[str]]:
    """The parameters in each signature of a docstring of pybind11."""
    for found in re.finditer(rf"(?:^|\s){re.escape(name)}\((self.*?)\) ->", text):
        yield [part.partition(":")[0].strip() for part in re.split(r", (?=\w+:)", found[1])][1:]


@pytest.mark.skipif(not STUBS.is_file(), reason="`make .typing/full` fetches TensorRT's stubs")
def test_every_name_and_parameter_is_one_of_tensorrt() -> None:
    """By its stubs."""
    classes = {node.name: node for node in ast.parse(STUBS.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)}
    compared = 0
    for name, member, value in offered(is_rtx=False):
        if not is_api(name, member) or member == "Severity":
            continue
        body = classes[name].body
        if value is None:
            assert member in {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}, f"{name}.{member}"
        else:
            found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == member]
            is_property = any(ast.unparse(mark) == "property" for node in found for mark in node.decorator_list)
            assert found and is_property == isinstance(value, property), f"{name}.{member}"
            if not is_property:
                assert parameters(value) in [[one.arg for one in node.args.args][1:] for node in found], f"{name}.{member}"
        compared += 1
    assert compared > 25


# What it refuses on streams and in captures.


def test_memory_that_another_stream_writes_is_not_read_before(cuda: Cuda) -> None:
    other = torch.cuda.Stream()
    written = torch.zeros(4)
    with torch.cuda.stream(other), pytest.raises(Race, match="reads memory that stream 0 uses"):
        written + 1
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        read = written + 1
    with pytest.raises(Race, match="writes memory that stream 1 uses"):
        written.zero_()
    other.synchronize()
    written.zero_()
    assert read.tolist() == [1.0] * 4


def test_a_capture_allows_no_work_of_the_host_and_its_graph_no_freed_memory(cuda: Cuda) -> None:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match=NOT_PERMITTED)
    with pytest.raises(RuntimeError, match="previous error during capture"), torch.cuda.graph(graph, stream=stream), refused:
        torch.zeros(4)
    assert torch.cuda.current_stream() is stream, "as in PyTorch, the stream of a failed capture stays current"
    with pytest.raises(RuntimeError, match="did not end well"):
        graph.replay()
    torch.cuda.set_stream(torch.cuda.default_stream())


def test_a_runtime_refuses_what_is_no_plan(stand_in: StandIn) -> None:
    class Logger(stand_in.trt.ILogger):  # type: ignore[name-defined, misc]
        said = ""

        def log(self, severity: Any, msg: str) -> None:
            Logger.said = msg

    runtime = stand_in.trt.Runtime(Logger())
    with torch.cuda.device(0):
        assert runtime.deserialize_cuda_engine(b"no plan") is None
    assert "magic tag" in Logger.said
    with pytest.raises(AssertionError, match="without a device guard"):
        runtime.deserialize_cuda_engine(b"no plan")
