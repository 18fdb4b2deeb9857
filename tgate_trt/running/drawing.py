"""What is drawn, the one way to draw it, and the files that show several gates side by side."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.files import replacing
from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE, after_gate_of
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.schedule import NONE, GateStep, check_gate_step, noise_of, parse_gate_step, planning_steps
from tgate_trt.running.pipeline import load

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""diffusers' class and settings of each scheduler, by the name that the commands take."""

_CELL = 192
"""Smallest side of a picture on a sheet, in pixels."""
_MARGIN, _LABEL = 12, 22
_LARGEST_SEED = 2**63 - 1

FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of each kind of file that pictures are written to."""
_EXIF_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769


@dataclass(frozen=True)
class Drawing:
    """Pictures to draw. Picture i has prompt i and starts from the noise of ``seed + i``, in batches of any size.

    None stands for the model's own value.

    Raises:
        InputError: if ``steps`` is below 1, or a seed is none of PyTorch's.
    """

    prompts: tuple[str, ...] = ()
    """One for each picture."""
    negative_prompt: str | None = None
    """For all pictures."""
    steps: int | None = None
    """Sampling steps."""
    seed: int = 0
    guidance_scale: float | None = None
    scheduler: str | None = None
    """A key of `SCHEDULERS`."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}; choose another number of steps")
        if not 0 <= self.seed <= _LARGEST_SEED - len(self.prompts):
            raise InputError(f"a seed is a number from 0 to {_LARGEST_SEED - len(self.prompts)}, got {self.seed}; choose another seed")

    def of(self, bundle: Bundle) -> Drawing:
        """The same pictures in the size of a bundle, with its model's number of steps and guidance scale where they are None."""
        manifest = bundle.manifest
        return replace(
            self,
            steps=manifest.steps if self.steps is None else self.steps,
            guidance_scale=manifest.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            height=manifest.built_for.height,
            width=manifest.built_for.width,
        )

    def batches(self, size: int) -> Iterator[Drawing]:
        """These pictures in batches of at most ``size``, each with the prompts and the noise of its own pictures."""
        for start in range(0, len(self.prompts), size):
            yield replace(self, prompts=self.prompts[start : start + size], seed=self.seed + start)


def draw(pipeline: Callable[..., Any], drawing: Drawing, **more: Any) -> Any:
    """Draw all pictures of a drawing in one call of a pipeline.

    Args:
        pipeline: a diffusers pipeline, called as it is, or a function with the same keywords; see `prepare` for the scheduler.
        drawing: the pictures.
        **more: further keywords of the pipeline, such as ``output_type``.

    Returns:
        The pipeline's ``images``: a list of PIL images, or a tensor if ``output_type`` is ``"pt"`` or ``"latent"``.
    """
    count = len(drawing.prompts)
    arguments = {
        "negative_prompt": None if drawing.negative_prompt is None else [drawing.negative_prompt] * count,
        "num_inference_steps": drawing.steps,
        "guidance_scale": drawing.guidance_scale,
        "height": drawing.height,
        "width": drawing.width,
        # The graphs have one size, from which PixArt's pipelines would depart.
        "use_resolution_binning": False if "use_resolution_binning" in signature(pipeline).parameters else None,
    }
    return pipeline(
        prompt=list(drawing.prompts),
        generator=[torch.Generator().manual_seed(drawing.seed + number) for number in range(count)],
        **{name: value for name, value in arguments.items() if value is not None},
        **more,
    ).images


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures with 8 bits a channel, as in a file: ``[pictures, 3, height, width]`` in 0…1 becomes uint8 on the CPU."""
    return (pictures.float() * 255).round().to(torch.uint8).cpu()


def prepare(pipeline: Any, scheduler: str | None) -> Any:
    """Give a pipeline the scheduler of a drawing, and turn its progress bar off.

    Args:
        pipeline: a diffusers pipeline.
        scheduler: a key of `SCHEDULERS`, or None to keep the pipeline's own.

    Returns:
        The same pipeline.

    Raises:
        InputError: if there is no scheduler of that name.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(pipeline, scheduler)
    return pipeline


def scheduler_of(pipeline: Any, name: str | None) -> Any:
    """A scheduler by name, with the betas and the prediction type of the pipeline's own; the pipeline's own if ``name`` is None.

    Raises:
        InputError: if there is no scheduler of that name.
    """
    import diffusers

    if name is None:
        return pipeline.scheduler
    if name not in SCHEDULERS:
        raise InputError(f"there is no scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)


@dataclass(frozen=True)
class Column:
    """The pictures of one gate."""

    label: str
    pictures: tuple[Image.Image, ...]
    """One for each prompt of the drawing."""
    seconds: float
    """Time of all pictures, after one warm-up and without loading."""
    gate_step: GateStep
    after_gate: str


def draw_columns(
    bundle: str | os.PathLike[str],
    drawing: Drawing,
    *,
    gate_steps: Sequence[str] = (),
    after_gate: Sequence[str] = (DEFAULT_AFTER_GATE,),
    batch_size: int = 1,
    backend: str | None = None,
    threads: int | None = None,
) -> list[Column]:
    """Draw the same pictures with every gate.

    Args:
        bundle: folder of a bundle.
        drawing: the pictures.
        gate_steps: as the commands take them; the bundle's own if empty.
        after_gate: keys of `tgate_trt.gate.after_gate.AFTER_GATE`, each combined with every gate step.
        batch_size: pictures in one call of the pipeline.
        backend: see `tgate_trt.load`.
        threads: see `tgate_trt.load`.

    Raises:
        InputError: if a setting is impossible; nothing has been drawn then.
        BundleError: if the bundle cannot be used.
    """
    opened = Bundle.open(bundle)
    drawing = drawing.of(opened)
    assert drawing.steps is not None
    gates = [check_gate_step(parse_gate_step(text)) for text in gate_steps] or [opened.manifest.default_gate_step]
    for gate_step in gates:
        if noise_of(gate_step) is None:
            planning_steps(gate_step, drawing.steps)
    for mode in after_gate:
        after_gate_of(mode)
    pipeline = prepare(load(opened, backend=backend, threads=threads), drawing.scheduler)
    _refuse_what_cannot_draw(pipeline, drawing.steps)
    denoiser = getattr(pipeline, opened.manifest.model.attribute)
    return [
        _column(pipeline, denoiser, list(drawing.batches(batch_size)), gate_step, mode)
        for gate_step in gates
        for mode in (after_gate if gate_step != NONE else after_gate[:1])
    ]


def _refuse_what_cannot_draw(pipeline: Any, steps: int) -> None:
    """Refuse a pipeline that needs more than a prompt, or has fewer steps than are asked for.

    Raises:
        InputError: with what it needs.
    """
    if "image" in signature(pipeline.__call__).parameters:
        raise InputError(
            f"this bundle's {type(pipeline).__name__} draws from pictures, and tgate-generate draws from prompts alone; use tgate_trt.load"
        )
    most = pipeline.scheduler.config.get("num_train_timesteps", steps)
    if steps > most:
        raise InputError(f"{type(pipeline.scheduler).__name__} has {most} steps at most, got {steps}; choose fewer steps")


def _column(pipeline: Any, denoiser: GatedDenoiser, batches: Sequence[Drawing], gate_step: GateStep, after_gate: str) -> Column:
    """Draw every batch with one gate, after a run of two steps that warms up both engines."""
    denoiser.after_gate = after_gate
    denoiser.gate_step = gate_step if gate_step == NONE else 1
    draw(pipeline, replace(batches[0], steps=2))
    denoiser.gate_step = gate_step
    start = time.perf_counter()
    pictures = tuple(picture for batch in batches for picture in draw(pipeline, batch))
    return Column(label_of(gate_step, after_gate), pictures, time.perf_counter() - start, gate_step, after_gate)


def label_of(gate_step: GateStep, after_gate: str) -> str:
    """The label of a gate; it names what follows the gate unless that is the default."""
    if gate_step == NONE:
        return "vanilla"
    return f"gate step {gate_step}" + ("" if after_gate == DEFAULT_AFTER_GATE else f", {after_gate}")


def check_output(output: Path | None) -> None:
    """Check before drawing that pictures can be written to a file or folder; see `save`.

    Raises:
        InputError: if they cannot.
    """
    if output is None:
        return
    if output.suffix and output.suffix.lower() not in FORMATS and not output.is_dir():
        raise InputError(f"--output takes a {', '.join(FORMATS)} file or a folder, got {output}; choose another --output")
    folder = output if output.suffix.lower() not in FORMATS else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --output") from error
    if output.is_dir() and output.suffix.lower() in FORMATS:
        raise InputError(f"{output} is a folder, and its name is that of a file; choose another --output")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: Permission denied; choose another --output")


def save(columns: Sequence[Column], drawing: Drawing, output: Path | None) -> list[Path]:
    """Write the pictures: one picture or one sheet into a file, or each picture into a folder, with the settings in their metadata.

    Args:
        columns: the result of `draw_columns`.
        drawing: the drawing that `draw_columns` took.
        output: a file of `FORMATS`, or a folder; ``pictures/<prompt>.png`` if None.

    Returns:
        The files.

    Raises:
        InputError: if a file cannot be written.
    """
    output = output or Path("pictures") / f"{_slug(drawing.prompts[0])}.png"
    check_output(output)
    try:
        if output.suffix.lower() in FORMATS:
            single = columns[0].pictures[0] if len(columns) == 1 and len(columns[0].pictures) == 1 else None
            _save(single or sheet(columns, drawing.prompts), output, _settings(drawing, columns, range(len(drawing.prompts))))
            return [output]
        paths = []
        for column in columns:
            for index, picture in enumerate(column.pictures):
                paths.append(output / f"{index:03d}-{_slug(column.label)}.png")
                _save(picture, paths[-1], _settings(drawing, [column], [index]))
        return paths
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror or error}; choose another --output") from error


def _settings(drawing: Drawing, columns: Sequence[Column], indices: Sequence[int]) -> str:
    """What a file shows, as JSON: the settings of the drawing, and prompts, seeds and gates of its pictures."""
    common = {name: value for name, value in vars(drawing).items() if name not in ("prompts", "seed") and value is not None}
    pictures = [{"prompt": drawing.prompts[index], "seed": drawing.seed + index} for index in indices]
    gates = [{"gate_step": column.gate_step, "after_gate": column.after_gate} for column in columns]
    return json.dumps({"software": f"tgate-trt {metadata.version('tgate-trt')}", **common, "pictures": pictures, "gates": gates})


def sheet(columns: Sequence[Column], captions: Sequence[str]) -> Image.Image:
    """All pictures in one image: a row for each picture, under its caption, and a column for each gate."""
    width, height = columns[0].pictures[0].size
    scale = max(1, -(-_CELL // min(width, height)))
    cell_width, cell_height = width * scale + _MARGIN, height * scale + _LABEL + _MARGIN
    font = ImageFont.load_default(size=13)
    widest = max(int(font.getlength(caption)) for caption in captions)
    page_size = max(len(columns) * cell_width, widest) + _MARGIN, _LABEL + _MARGIN + len(captions) * cell_height
    page = Image.new("RGB", page_size, "white")
    canvas = ImageDraw.Draw(page)
    for x, column in enumerate(columns):
        canvas.text((_MARGIN + x * cell_width, _MARGIN), f"{column.label}: {column.seconds:.2f} s", "black", font)
        for y, picture in enumerate(column.pictures):
            top = _LABEL + _MARGIN + y * cell_height
            page.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (_MARGIN + x * cell_width, top + _LABEL))
    for y, caption in enumerate(captions):
        canvas.text((_MARGIN, _LABEL + _MARGIN + y * cell_height + 2), caption, "dimgray", font)
    return page


def _save(picture: Image.Image, path: Path, settings: str) -> None:
    """Write a picture, whole or not at all: PNG has its settings in the text ``parameters``, the others in EXIF's user comment."""
    text, exif = PngInfo(), picture.getexif()
    text.add_text("parameters", settings)
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + settings.encode("utf-16-be")
    kind = FORMATS[path.suffix.lower()]
    with replacing(path) as partial:
        picture.save(partial, format=kind, quality=95, **({"pnginfo": text} if kind == "PNG" else {"exif": exif}))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or "picture"
