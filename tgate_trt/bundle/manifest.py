"""The manifest: what a bundle holds, what it was built from, with and for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from tgate_trt.errors import BundleError, InputError
from tgate_trt.gate.schedule import GateStep
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import Bounds, GraphSpec
from tgate_trt.taps import recipe

SCHEMA = 3
"""Version of the manifest's form; a bundle of another one is built again."""

MANIFEST = "manifest.json"
STAMPS = ".stamps.json"
TRACE = "trace.onnx"
PIPELINE = "pipeline"

BESIDE = ".tgate-trt"
"""Folder beside bundles for what they share: builders' logs, timing caches, kernels compiled for this machine's GPU."""


def graph_file(graph: str) -> str:
    """File of a graph in a bundle."""
    return f"{graph}.onnx"


BoundsText = Annotated[Bounds, PlainValidator(Bounds.parse), PlainSerializer(str)]
GraphData = Annotated[GraphSpec, PlainValidator(GraphSpec.from_json), PlainSerializer(GraphSpec.to_json)]


@dataclass(frozen=True)
class BuiltFrom:
    """The model that a bundle was built from."""

    name: str
    reference: ModelReference
    attribute: str
    """Of the denoiser in a pipeline: ``"unet"`` or ``"transformer"``."""
    text_tokens: int
    """Of an encoded prompt."""
    components: tuple[str, ...]
    """Graphs that its text encoders and VAE can become."""
    fingerprint: Mapping[str, Any]
    """Of its files; see `tgate_trt.models.source.ModelSource.fingerprint`."""

    @property
    def content(self) -> str:
        """Hash of all that a bundle is built from."""
        return str(self.fingerprint["content"])


@dataclass(frozen=True)
class BuiltFor:
    """What a bundle's graphs are for; each field is a reason to build again when it changes."""

    precision: str
    """Of `tgate_trt.specs.PRECISIONS`."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    batch_size: BoundsText
    """Images of a run."""
    fuse_cache_reuse: bool
    """Whether the reuse of the cache is one op of the graphs, not an addition and a norm."""

    def rows(self, graph: str) -> Bounds:
        """Rows of a denoiser's graph: the fidelity graph runs without guidance, the others with or without."""
        images = self.batch_size
        if recipe(graph).takes_in:
            return images
        return Bounds(images.minimum, 2 * images.optimum, 2 * images.maximum)


@dataclass(frozen=True)
class EngineSet:
    """The engines of one backend."""

    files: Mapping[str, str]
    """File of each graph's engine."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What they were built for: options of the backend, ``weights`` among them."""
    built_with: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that made them, beside those that made the graphs."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """By graph, a hash of everything that an engine depends on: engines of one key are interchangeable."""


@dataclass(frozen=True)
class HeldLora:
    """A LoRA that was put into a bundle after its build."""

    file: str
    """In the bundle."""
    scale: float
    name: str
    """That the file had."""


@dataclass(frozen=True)
class HeldFile:
    """A file of a bundle."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds, what it was built from, with and for."""

    model: BuiltFrom
    built_for: BuiltFor
    built_with: Mapping[str, str]
    """Versions of the packages that made the graphs."""
    graphs: Mapping[str, GraphData]
    engines: Mapping[str, EngineSet]
    """By backend."""
    verification: Mapping[str, Any]
    """What was compared with eager PyTorch, by graph; empty for a build with ``verify=False``."""
    gate_step: GateStep | None
    """The model's default, or None if it has none."""
    steps: int
    """The model's default number of sampling steps."""
    guidance_scale: float | None
    """The model's default, or None for the pipeline's."""
    lora: tuple[HeldLora, ...] = ()
    files: Mapping[str, HeldFile] = field(default_factory=dict)
    """By path in the bundle."""

    def to_json(self) -> dict[str, Any]:
        """This manifest as plain JSON data."""
        data: dict[str, Any] = _form().dump_python(self, mode="json")
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            BundleError: if the data has another form or schema version.
        """
        if not isinstance(data, dict) or "schema" not in data:
            raise BundleError("its manifest.json is not one of tgate-trt")
        if data["schema"] != SCHEMA:
            raise BundleError(f"its manifest has schema version {data['schema']!r}, this version reads {SCHEMA}; build it again")
        try:
            return _form().validate_python({name: value for name, value in data.items() if name != "schema"})
        except (ValidationError, InputError, AttributeError, TypeError) as error:
            reason = str(error)
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False)[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise BundleError(f"its manifest is not in the form of schema {SCHEMA} ({reason}); build it again") from error


@cache
def _form() -> TypeAdapter[Manifest]:
    """Reads and writes manifests."""
    return TypeAdapter(Manifest)
