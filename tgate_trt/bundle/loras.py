"""Other weights in a bundle that is built: LoRAs fused into the bundle's own weights when its engines are loaded.

A bundle's weights stay as they were built. A refitted bundle holds the LoRA files beside them, so that each refit begins
from the originals, and taking the LoRAs away leaves what was there before.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tgate_trt.bundle.backends import UNCOMPILED
from tgate_trt.bundle.bundle import Bundle, copy_into, describe_files, write_manifest
from tgate_trt.bundle.components import component_of, weight_files
from tgate_trt.bundle.folder import building, locked
from tgate_trt.bundle.manifest import HeldLora
from tgate_trt.errors import StaleBundleError, UnsupportedError
from tgate_trt.files import read_json, read_named, shapes_of
from tgate_trt.models.lora import Lora, LoraFile, fuse, parameter_names

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "lora"
"""Folder of the LoRA files in a refitted bundle."""


@dataclasses.dataclass(frozen=True)
class BundleLoras:
    """LoRAs that were read for a bundle's model and fit it."""

    bundle: Bundle
    loras: tuple[Lora, ...]

    @classmethod
    def read(cls, bundle: Bundle, files: Sequence[LoraFile] | None = None) -> BundleLoras:
        """Read LoRA files.

        Args:
            bundle: for whose model they are.
            files: those that the bundle holds itself if None.

        Raises:
            InputError: if one does not fit the model.
            StaleBundleError: if the bundle's weights were discarded.
        """
        if files is None:
            files = [LoraFile(bundle.folder / held.file, held.scale) for held in bundle.manifest.lora]
        config = read_json(bundle.pipeline / bundle.manifest.model.attribute / "config.json") if files else {}
        loras = tuple(Lora.read(file, config) for file in files)
        for component in {name for lora in loras for name in lora.factors}:
            shapes = shapes_of(_files(bundle, component))
            for lora in loras:
                lora.check(component, shapes)
        return cls(bundle, loras)

    def weights(self, component: str) -> dict[str, Tensor]:
        """The weights of a component that they change, fused from the bundle's own, by their names there."""
        changed = {name for lora in self.loras for name in lora.factors.get(component, ())}
        if not changed:
            return {}
        own = {name for changed_name in changed for name in parameter_names(changed_name)}
        return dict(fuse(self.loras, component, read_named(_files(self.bundle, component), own)))

    def refuse_what_cannot_be_refitted(self, backend: str) -> None:
        """Refuse LoRAs that a backend's engines cannot take.

        Raises:
            UnsupportedError: with the engine's name and what to do.
        """
        engines = self.bundle.manifest.engines[backend]
        if backend in UNCOMPILED or engines.options["weights"] == "shared" or engines.options["refittable"] or engines.options["stripped"]:
            return
        for graph in engines.files:
            changed = self._changed(component_of(self.bundle, graph))
            if engines.options["weights"] == "shared-linear":
                changed = {name: shape for name, shape in changed.items() if len(shape) > 2}
            if changed:
                raise UnsupportedError(
                    f"the {backend} engine of {graph} holds {next(iter(changed))!r}, which the LoRA changes; "
                    "build the bundle with --weights shared, or with --lora"
                )

    def _changed(self, component: str) -> Mapping[str, tuple[int, ...]]:
        """The parameters that they change, and the shapes of the ``down`` factors: four dimensions for a convolution."""
        return {name: tuple(down.shape) for lora in self.loras for name, (_, down) in lora.factors.get(component, {}).items()}


def refit_bundle(bundle: Bundle, files: Sequence[LoraFile]) -> Bundle:
    """Put LoRA files into a bundle in the place of those that are there, and open it anew.

    Raises:
        InputError: if a file does not fit the model.
        UnsupportedError: if an engine holds its weights and cannot be given others.
        StaleBundleError: if the bundle's weights were discarded.
    """
    loras = BundleLoras.read(bundle, files)
    for backend in bundle.manifest.engines:
        loras.refuse_what_cannot_be_refitted(backend)
    with locked(bundle.folder), building(bundle.folder) as folder:
        copy_into(bundle, folder)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        held = []
        for index, file in enumerate(files):
            place = Path(FOLDER) / f"{index}.safetensors"
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(file.path, folder / place)
            held.append(HeldLora(str(place), file.scale, file.path.name))
        known = {name: entry for name, entry in bundle.manifest.files.items() if not name.startswith(f"{FOLDER}/")}
        write_manifest(folder, dataclasses.replace(bundle.manifest, lora=tuple(held), files=describe_files(folder, known)))
    return Bundle.open(bundle.folder)


def _files(bundle: Bundle, component: str) -> tuple[Path, ...]:
    """The safetensors files of a component's weights in a bundle."""
    if component != bundle.manifest.model.attribute:
        return tuple(sorted((bundle.pipeline / component).glob("*.safetensors")))
    files = weight_files(bundle, "planning")
    if not all(path.is_file() for path in files):
        raise StaleBundleError(
            f"{bundle.folder} holds no weights to fuse a LoRA into; build it again without --discard-graphs, or with --lora"
        )
    return files
