"""Traces in the user's cache: an architecture is traced once on a machine, whatever weights its models have.

A file is named by the hash of all that decides the trace, so none is ever out of date. It holds no weights.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import tgate_trt
from tgate_trt import export
from tgate_trt.building.toolchain import toolchain
from tgate_trt.files import cache_folder, replacing
from tgate_trt.specs import GraphSpec

logger = logging.getLogger(__name__)

MOST = 64
"""Traces that are kept; beyond them those go that were used longest ago."""

_MODULES = ("eager", "ip_adapter", "specs", "taps")
"""Modules of the package that decide a trace, beside those of the room ``export``."""

_NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration of transformers that decide nothing: the dtype is that of the build."""


@dataclass(frozen=True)
class Traced:
    """What a trace was made from: all that decides it but for the versions of packages."""

    kind: str
    """Name of the model's class."""
    config: Mapping[str, Any]
    precision: str
    spec: GraphSpec
    """Inputs, and the bounds of what may vary."""

    @property
    def key(self) -> str:
        """Hash that names the trace."""
        versions = toolchain() | {"python": platform.python_version()}
        decides = asdict(self) | {"config": _settings(self.kind, self.config), "versions": versions, "source": _source()}
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()


def find(traced: Traced) -> ir.Model | None:
    """The trace that was kept; None if there is none, or if it is damaged."""
    path = _place(traced)
    try:
        digest, data = (content := path.read_bytes())[:64], content[64:]
        path.touch()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest().encode() != digest:
        return None
    logger.info("the trace of %s is that of an earlier build, %s", traced.kind, path)
    return _from_bytes(data)


def keep(traced: Traced, model: ir.Model) -> ir.Model:
    """Keep a trace, where the cache can be written, and return it as `find` would.

    Args:
        traced: what it was made from.
        model: without weights, from `tgate_trt.export.trace` or `tgate_trt.export.components`.
    """
    data, path = ir.to_proto(model).SerializeToString(deterministic=True), _place(traced)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(hashlib.sha256(data).hexdigest().encode() + data)
        for old in sorted(path.parent.glob("*.trace"), key=lambda file: file.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.info("the trace of %s is not kept: %s", traced.kind, error)
    return _from_bytes(data)


def _settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without notes on the file that it is from, and with the defaults that are left out of some files."""
    if "_class_name" in config:
        import diffusers

        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}
        return defaults | {name: value for name, value in config.items() if not name.startswith("_")}
    import transformers

    whole = getattr(transformers, kind).config_class.from_dict(dict(config)).to_dict()
    return {name: value for name, value in whole.items() if name not in _NOTES}


def _from_bytes(data: bytes) -> ir.Model:
    import onnx

    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
    return model


def _place(traced: Traced) -> Path:
    return cache_folder("traces") / f"{traced.key}.trace"


def _source() -> str:
    """Hash of our own modules that decide a trace."""
    files = [Path(f"{tgate_trt.__path__[0]}/{name}.py") for name in _MODULES]
    digest = hashlib.sha256()
    for file in (*files, *sorted(Path(export.__path__[0]).glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()
