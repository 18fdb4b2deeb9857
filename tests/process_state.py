"""State of the process that outlives a test: taken before and after each one, it shows which test left the process changed."""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
import os
import reprlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

WATCHED = ("tgate_trt", "triton", "diffusers", "transformers", "huggingface_hub")
"""Packages whose modules and classes must keep their attributes: ours, and those that a test or we could patch."""

_OF_OTHERS = ("PYTEST_", "COV_", "_TORCHINDUCTOR_", "KMP_")
"""Variables that pytest changes, one in which `torch.compile` keeps an address that stays the same, and those that OpenMP sets once."""
_LOADED_ANEW = ("__triton_launcher",)
"""Names under which Triton loads one compiled module after the other."""
_COMPILED = ("__compiled_fn_", "__resume_at_", "__builtins_dict_", "__import_")
"""How names begin that `torch.compile` adds to a module for its own use, and removes again when it is reset."""
_ABSENT: Any = "absent"


@dataclass(frozen=True)
class ProcessState:
    """What a test must leave as it was. The states of random generators are not part of it: they may move."""

    values: dict[str, Any]
    """Settings by name; one that is new afterwards is a change too."""
    loggers: dict[str, Any]
    """Level and handlers of loggers; one that is new afterwards is no change, for an import makes it."""
    modules: dict[str, Any]
    """Every module by name; an import adds some."""
    attributes: list[tuple[Any, dict[str, Any]]]
    """Modules and classes of `WATCHED`, each with its attributes."""

    @classmethod
    def now(cls) -> ProcessState:
        """The state at this moment."""
        return cls(_values(), _loggers(), dict(sys.modules), [(owner, dict(vars(owner))) for owner in owners(WATCHED)])

    def changes_since(self, before: ProcessState) -> list[str]:
        """One line for each difference from an earlier state."""
        found = []
        for name in before.values.keys() | self.values.keys():
            old, new = before.values.get(name, _ABSENT), self.values.get(name, _ABSENT)
            if old != new:
                found.append(f"{name} was {reprlib.repr(old)}, is {reprlib.repr(new)}")
        for name, old in before.loggers.items():
            if (new := self.loggers.get(name, _ABSENT)) != old:
                found.append(f"logger {name!r} was {old}, is {new}")
        found += [
            f"module {name} was exchanged or removed"
            for name, old in before.modules.items()
            if self.modules.get(name) is not old and name not in _LOADED_ANEW
        ]
        for owner, attributes in before.attributes:
            for name, old, new in _changed(owner, attributes):
                if old is not None:  # else it is a cache that was filled
                    found.append(f"{_name(owner)}.{name} was {reprlib.repr(old)}, is {reprlib.repr(new)}")
        return sorted(found)


def wait_for_threads(before: ProcessState, seconds: float = 10) -> None:
    """Give new threads time to end: those of a pool may do so after the work is done, when the pool is collected."""
    new = [thread for thread in threading.enumerate() if thread.ident not in before.values.values()]
    if new:
        gc.collect()
    for thread in new:
        thread.join(seconds)


@contextlib.contextmanager
def restored(*packages: str) -> Iterator[None]:
    """Undo at the end whatever became of the attributes of packages' modules and classes.

    Args:
        packages: names, such as ``triton.language``; their submodules are part of them.
    """
    before = [(owner, dict(vars(owner))) for owner in owners(packages)]
    try:
        yield
    finally:
        for owner, attributes in before:
            for name, old, _ in _changed(owner, attributes):
                setattr(owner, name, old)
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)


def owners(packages: tuple[str, ...]) -> list[Any]:
    """The loaded modules of packages and the classes that they define."""
    found: list[Any] = []
    submodules = tuple(f"{package}." for package in packages)
    for module_name, module in list(sys.modules.items()):
        if module is not None and (module_name in packages or module_name.startswith(submodules)):
            found.append(module)
            found += [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module_name]
    return found


def _changed(owner: Any, before: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Attributes that are not what they were: name, before, now. Those that are new are left out: lazy imports add some."""
    now = vars(owner)
    if all(map(operator.is_, map(now.get, before), before.values())):  # as a rule, and there are thousands of owners
        return []
    kept = {name: old for name, old in before.items() if not name.startswith(_COMPILED)}
    return [(name, old, now.get(name, _ABSENT)) for name, old in kept.items() if now.get(name, _ABSENT) is not old]


def _name(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)


def _values() -> dict[str, Any]:
    values: dict[str, Any] = {f"os.environ[{name!r}]": value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}
    values["working directory"] = os.getcwd()  # noqa: PTH109 - pathlib's calls this
    values["sys.path"] = tuple(path for path in sys.path if not path.endswith("_vendor"))  # setuptools adds its own when it is imported
    values["sys.argv"] = tuple(sys.argv)
    values |= {f"handler of {number.name}": signal.getsignal(number) for number in signal.Signals}
    values |= {f"thread {thread.name}": thread.ident for thread in threading.enumerate()}
    values |= {f"child process {child.pid}": child.pid for child in psutil.Process().children()}
    return values | _settings_of_torch()


def _settings_of_torch() -> dict[str, Any]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch inference mode": torch.is_inference_mode_enabled(),
        "torch deterministic algorithms": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "torch precision of products": torch.get_float32_matmul_precision(),
        "torch TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "torch cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "torch autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "torch attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }


def _loggers() -> dict[str, Any]:
    """Level, handlers and the rest of the root logger and those of `WATCHED`; the level of the others, which libraries set up lazily."""
    state: dict[str, Any] = {"root": _logger(logging.root)}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger):
            state[name] = _logger(logger) if name.split(".")[0] in WATCHED else logging.getLevelName(logger.level)
    return state


def _logger(logger: logging.Logger) -> tuple[Any, ...]:
    handlers = [handler for handler in logger.handlers if not type(handler).__module__.startswith("_pytest.")]
    return logging.getLevelName(logger.level), handlers, logger.propagate, logger.disabled
