"""Other weights in a bundle that is built: LoRAs fused into the bundle's own weights when its engines are loaded.

A bundle's weights stay as they were built. A refitted bundle holds the LoRA files beside them, so that each refit begins
from the originals, and taking the LoRAs away leaves what was there before.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.backends import UNCOMPILED, weight_files
from tgate_trt.bundle import Bundle, building, copy_into, describe_files, write_manifest
from tgate_trt.errors import StaleBundleError, UnsupportedError
from tgate_trt.lora import Lora, LoraFile, fuse
from tgate_trt.stored_weights import read_json
from tgate_trt.taps import GRAPHS

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "lora"
"""Folder of the LoRA files in a refitted bundle."""


def refit(target: str | os.PathLike[str] | Bundle | Any, lora: Sequence[str | LoraFile] = ()) -> Any:
    """Put LoRAs into a bundle without building it again, or into a pipeline that was loaded from one.

    Args:
        target: folder of a bundle, a bundle that is open, or a pipeline of `tgate_trt.load` or `tgate_trt.apply`.
        lora: files, ``"FILE"`` or ``"FILE:SCALE"``, that take the place of those of an earlier refit; none brings back the
            weights that were built.

    Returns:
        The bundle, opened anew, or the same pipeline.

    Raises:
        InputError: if a file is no LoRA, or of another architecture.
        UnsupportedError: if an engine holds its weights and cannot be given others.
        StaleBundleError: if the bundle's weights were discarded.
    """
    files = [LoraFile.parse(one) if isinstance(one, str) else one for one in lora]
    if isinstance(target, str | os.PathLike | Bundle):
        return _refit_bundle(target if isinstance(target, Bundle) else Bundle.open(target), files)
    from tgate_trt.pipeline import refit_pipeline

    return refit_pipeline(target, files)


def _refit_bundle(bundle: Bundle, files: Sequence[LoraFile]) -> Bundle:
    """Put LoRA files into a bundle in the place of those that are there."""
    loras = read(bundle, files)
    for backend in bundle.manifest.engines:
        refuse_what_cannot_be_refitted(bundle, backend, loras)
    with building(bundle.folder) as folder:
        copy_into(bundle, folder)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        held = []
        for index, file in enumerate(files):
            place = Path(FOLDER) / f"{index}.safetensors"
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(file.path, folder / place)
            held.append({"file": str(place), "scale": file.scale, "name": file.path.name})
        known = {name: entry for name, entry in bundle.manifest.files.items() if not name.startswith(f"{FOLDER}/")}
        manifest = dataclasses.replace(bundle.manifest, lora=held, files=describe_files(folder, known))
        write_manifest(folder, manifest)
    return Bundle.open(bundle.folder)


def loras_of(bundle: Bundle) -> list[Lora]:
    """The LoRAs of a refitted bundle."""
    return read(bundle, [LoraFile(bundle.folder / entry["file"], entry["scale"]) for entry in bundle.manifest.lora])


def read(bundle: Bundle, files: Sequence[LoraFile]) -> list[Lora]:
    """Read LoRA files for a bundle's model, and check that they fit it.

    Raises:
        InputError: if one does not.
        StaleBundleError: if the bundle's weights were discarded.
    """
    if not files:
        return []
    from tgate_trt.export.weights import read_places

    loras = [Lora.read(file, read_json(bundle.pipeline / bundle.manifest.model["attribute"] / "config.json")) for file in files]
    for component in {name for lora in loras for name in lora.factors}:
        shapes = {name: place.shape for path in _files(bundle, component) for name, place in read_places(path).items()}
        for lora in loras:
            lora.check(component, shapes)
    return loras


def fused(bundle: Bundle, loras: Sequence[Lora], component: str) -> dict[str, Tensor]:
    """The weights of a component that LoRAs change, fused from the bundle's own, by their names there."""
    from tgate_trt.engines.shared_weights import read_weights

    changed = {name.removeprefix("text_model.") for lora in loras for name in lora.factors.get(component, ())}
    if not changed:
        return {}
    own = {*changed, *(f"text_model.{name}" for name in changed)}
    return dict(fuse(loras, component, read_weights(_files(bundle, component), own)))


def component_of(bundle: Bundle, graph: str) -> str:
    """The pipeline's component whose weights a graph has."""
    if graph in GRAPHS:
        attribute: str = bundle.manifest.model["attribute"]
        return attribute
    return "vae" if graph == "vae_decoder" else graph


def refuse_what_cannot_be_refitted(bundle: Bundle, backend: str, loras: Sequence[Lora]) -> None:
    """Refuse LoRAs that a backend's engines cannot take.

    Raises:
        UnsupportedError: naming the engines and what to do.
    """
    engines = bundle.manifest.engines[backend]
    if backend in UNCOMPILED or engines.options["weights"] == "shared" or engines.options["refittable"] or engines.options["stripped"]:
        return
    for graph in engines.files:
        changed = _changed(loras, component_of(bundle, graph))
        if engines.options["weights"] == "shared-linear":
            changed = {name: shape for name, shape in changed.items() if len(shape) > 2}
        if changed:
            raise UnsupportedError(
                f"the {backend} engine of {graph} holds {next(iter(changed))!r}, which the LoRA changes; "
                "build the bundle with --weights shared, or with --lora"
            )


def _changed(loras: Sequence[Lora], component: str) -> Mapping[str, tuple[int, ...]]:
    """The parameters that LoRAs change, and the shapes of their ``down`` factors: four dimensions for a convolution."""
    return {name: tuple(down.shape) for lora in loras for name, (_, down) in lora.factors.get(component, {}).items()}


def _files(bundle: Bundle, component: str) -> tuple[Path, ...]:
    """The safetensors files of a component's weights in a bundle."""
    if component != bundle.manifest.model["attribute"]:
        return tuple(sorted((bundle.pipeline / component).glob("*.safetensors")))
    files = weight_files(bundle, "planning")
    if not all(path.is_file() for path in files):
        raise StaleBundleError(
            f"{bundle.folder} holds no weights to fuse a LoRA into; build it again without --discard-graphs, or with --lora"
        )
    return files
