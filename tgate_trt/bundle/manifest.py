"""The manifest: what a bundle holds, what it was built from, with and for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, PlainSerializer, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from tgate_trt.errors import BundleError, InputError
from tgate_trt.gate.gate import Gate, gate_of
from tgate_trt.gate.schedule import DEFAULT_GATE_STEP, NOISE, GateStep, check_gate_step
from tgate_trt.models.fingerprints import Fingerprint
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import PRECISIONS, Bounds, GraphSpec
from tgate_trt.taps import CROSS_ATTENTION, recipe

SCHEMA = 5
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


def _plain(path: str) -> str:
    """A path that stays in the bundle's folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or str(PurePosixPath(path)) != path:
        raise ValueError(f"{path!r} is not a path in the bundle")
    return path


def _precision(name: str) -> str:
    if name not in PRECISIONS:
        raise ValueError(f"a precision is one of {', '.join(PRECISIONS)}, got {name!r}")
    return name


PlainPath = Annotated[str, AfterValidator(_plain)]
Precision = Annotated[str, AfterValidator(_precision)]
Step = Annotated[GateStep, AfterValidator(check_gate_step)]
Noise = Annotated[float, Gt(0), Lt(math.inf)]
Count = Annotated[int, Ge(1)]
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
    fingerprint: Fingerprint
    """Of its files."""

    @property
    def content(self) -> str:
        """Hash of all that a bundle is built from."""
        return self.fingerprint["content"]


@dataclass(frozen=True)
class BuiltFor:
    """What a bundle's graphs are for; each field is a reason to build again when it changes."""

    precision: Precision
    """Of `tgate_trt.specs.PRECISIONS`."""
    height: BoundsText
    """Pixels; of one size, or of a range."""
    width: BoundsText
    """Pixels, likewise."""
    batch_size: BoundsText
    """Images of a run."""
    fuse_cache_reuse: bool
    """Whether the reuse of the cache is one op of the graphs, not an addition and a norm."""
    text_tokens: BoundsText
    """Of an encoded prompt."""
    controls: tuple[str, ...] = ()
    """What may add to the denoiser's hidden states, of `tgate_trt.models.signature.CONTROLS`."""

    def described(self) -> dict[str, Any]:
        """Its fields as people read them: one number for a range of one size, and nothing for no controls."""
        found = {name: value.short if isinstance(value, Bounds) else value for name, value in vars(self).items()}
        return found | {"controls": ", ".join(self.controls) or "none"}

    def rows(self, graph: str) -> Bounds:
        """Rows of a denoiser's graph: those that take in cross-attention run without guidance, the others with or without."""
        images = self.batch_size
        if CROSS_ATTENTION in recipe(graph).takes_in:
            return images
        return Bounds(images.minimum, 2 * images.optimum, 2 * images.maximum)


class EngineOptions(TypedDict, total=False):
    """What a backend's engines were built for."""

    weights: Literal["baked", "shared", "shared-linear"]
    """Of `tgate_trt.building.engines.WEIGHTS`."""
    gpu: str | None
    """Name of the GPU that they were built on and for, or None if they are for ``capabilities``."""
    plugins: bool
    """Whether they hold the plugin of the fused op; of TensorRT alone."""
    capabilities: list[str]
    """Compute capabilities that they run on, such as ``"SM89"``; empty for those of ``gpu``."""
    optimization_level: int | None
    workspace: int | None
    """Bytes."""
    version_compatible: bool
    hardware_compatible: bool
    refittable: bool
    stripped: bool


_ALWAYS = EngineOptions.__annotations__.keys() - {"plugins"}
"""Options that every engine set has, or none."""


class Check(TypedDict):
    """A comparison of a graph with eager PyTorch."""

    rows: int
    error: float
    """Relative L2 norm of the worst output."""
    output: NotRequired[str]
    """The worst output."""


class Report(TypedDict):
    """The comparisons of one graph, or of an engine of it."""

    compared_with: str
    tolerance: float
    checks: list[Check]


@dataclass(frozen=True)
class EngineSet:
    """The engines of one backend."""

    files: Mapping[str, PlainPath]
    """File of each graph's engine."""
    options: EngineOptions = field(default_factory=EngineOptions)
    """What they were built for; empty for backends that build nothing."""
    built_with: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that made them, beside those that made the graphs."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """By graph, a hash of everything that an engine depends on: engines of one key are interchangeable."""
    verification: Mapping[str, Report | str] = field(default_factory=dict)
    """By graph, what its engine was compared with, on the device that it is for; or the reason why it was not: ``"needs …"``."""

    def __post_init__(self) -> None:
        """Check that the options are whole.

        Raises:
            BundleError: if one is missing.
        """
        missing = _ALWAYS - self.options.keys()
        if self.options and missing:
            raise BundleError(f"its manifest lacks an engine's {sorted(missing)[0]!r}; build it again")


@dataclass(frozen=True)
class HeldLora:
    """A LoRA that was put into a bundle after its build."""

    file: PlainPath
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
    signature: GraphData
    """Inputs of the whole denoiser, of which a graph may lack some."""
    graphs: Mapping[str, GraphData]
    engines: Mapping[str, EngineSet]
    """By backend."""
    verification: Mapping[str, Report]
    """What was compared with eager PyTorch, by graph; empty for a build with ``verify=False``."""
    gate_step: Step | None
    """The model's published one, or None if it has none."""
    gate_noise: Noise | None
    """The noise level σ of that step in a run of ``steps`` with the model's own scheduler; None also if that shows no noise levels."""
    steps: Count
    """The model's default number of sampling steps."""
    guidance_scale: float | None
    """The model's default, or None for the pipeline's."""
    lora: tuple[HeldLora, ...] = ()
    after_gate: str | None = None
    """What the model's runs do from the gate on, or None for the method's own way."""
    gates: Mapping[str, str] = field(default_factory=dict)
    """Gates with names of their own, by name, in their text form."""
    files: Mapping[PlainPath, HeldFile] = field(default_factory=dict)
    """By path in the bundle."""

    @property
    def default_gate_step(self) -> GateStep:
        """The gate of runs that name none: the model's as a noise level, so that it suits every spacing of the steps, else as a step."""
        if self.gate_noise is not None:
            return f"{NOISE}{self.gate_noise:g}"
        return DEFAULT_GATE_STEP if self.gate_step is None else self.gate_step

    def gate(self, gate: Gate | str | int | float) -> Gate:
        """A gate from a gate, its text form, its step, or its name in this bundle.

        Raises:
            InputError: if it is none.
        """
        return gate_of(self.gates.get(gate, gate) if isinstance(gate, str) else gate)

    def check_files(self) -> None:
        """Check that every file that this manifest names is one whose hash it has.

        Raises:
            BundleError: with the first that is not.
        """
        engines = {file for held in self.engines.values() for file in held.files.values()}
        for file in sorted(engines | {held.file for held in self.lora}):
            if file not in self.files:
                raise BundleError(f"its manifest names {file} and has no hash of it; build the bundle again with --force")

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
            manifest = _form().validate_python({name: value for name, value in data.items() if name != "schema"})
        except (ValidationError, InputError, AttributeError, TypeError) as error:
            reason = str(error)
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False)[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise BundleError(f"its manifest is not in the form of schema {SCHEMA} ({reason}); build it again") from error
        manifest.check_files()
        return manifest


@cache
def _form() -> TypeAdapter[Manifest]:
    """Reads and writes manifests."""
    return TypeAdapter(Manifest)
