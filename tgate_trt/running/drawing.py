"""What is drawn, and the one way to draw it, with one gate or with several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import graph_file
from tgate_trt.errors import InputError
from tgate_trt.export.macs import macs_of_graph
from tgate_trt.gate.actions import substitute, work_of
from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE
from tgate_trt.gate.denoiser import GatedDenoiser, LatestRun
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, check_gate_step, noise_of, parse_gate_step, planning_steps
from tgate_trt.running.pipeline import load

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    # Heun's first step is a trapezoid: from a level without any signal, where trailing steps may begin, it would be far too long.
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""diffusers' class and settings of each scheduler, by the name that the commands take."""

_LARGEST_SEED = 2**63 - 1


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
            height=manifest.built_for.height.optimum,
            width=manifest.built_for.width.optimum,
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
    gate: Gate
    steps: int
    """Of the run of each picture."""
    planning_steps: int
    """Those of them before the gate."""
    work: float | None = None
    """Multiply-accumulates of the denoiser as a share of those without a gate; None for a single column, or without graphs to count."""


def draw_columns(
    bundle: str | os.PathLike[str],
    drawing: Drawing,
    *,
    gate_steps: Sequence[str] = (),
    after_gate: Sequence[str] = (DEFAULT_AFTER_GATE,),
    gates: Sequence[str] = (),
    batch_size: int = 1,
    backend: str | None = None,
    threads: int | None = None,
) -> list[Column]:
    """Draw the same pictures with every gate.

    Args:
        bundle: folder of a bundle.
        drawing: the pictures.
        gate_steps: as the commands take them; the bundle's own if empty and there are no ``gates``.
        after_gate: keys of `tgate_trt.gate.after_gate.AFTER_GATE`, each combined with every gate step.
        gates: further ones in text form, or by their names in the bundle.
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
    steps = [check_gate_step(parse_gate_step(text)) for text in gate_steps]
    steps = steps or ([] if gates else [opened.manifest.default_gate_step])
    ways = [Gate(step, mode) for step in steps for mode in (after_gate if step != NONE else after_gate[:1])]
    ways += [opened.manifest.gate(text) for text in gates]
    for gate in ways:
        if noise_of(gate.boundary) is None:
            planning_steps(gate.boundary, drawing.steps)
    pipeline = prepare(load(opened, gate=ways[0], backend=backend, threads=threads), drawing.scheduler)
    _refuse_what_cannot_draw(pipeline, drawing.steps)
    denoiser, batches = getattr(pipeline, opened.manifest.model.attribute), list(drawing.batches(batch_size))
    for gate in ways:
        denoiser.gate = gate  # refuses one for which the bundle has no engines, before anything is drawn
    count = _counter(opened) if len(ways) > 1 else None
    return [_column(pipeline, denoiser, batches, gate, count) for gate in ways]


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


def _column(pipeline: Any, denoiser: GatedDenoiser, batches: Sequence[Drawing], gate: Gate, count: Count | None) -> Column:
    """Draw every batch with one gate, after a run that warms up its engines: of two steps, if the gate is a step and nothing else."""
    is_plain = gate == Gate(gate.step, gate.after)
    denoiser.gate = gate if gate.step == NONE or not is_plain else Gate(1, gate.after)
    draw(pipeline, replace(batches[0], steps=2) if is_plain else batches[0])
    denoiser.gate = gate
    start = time.perf_counter()
    pictures = tuple(picture for batch in batches for picture in draw(pipeline, batch))
    seconds, run = time.perf_counter() - start, denoiser.latest_run
    label, work = label_of(gate), None if count is None else _work(run, count)
    return Column(label, pictures, seconds, gate, run.schedule.steps, run.schedule.gate_step, work)


Count = Callable[[str, int], int]
"""Takes the name of a graph and a number of rows, and returns the multiply-accumulates of one call."""


def _counter(bundle: Bundle) -> Count | None:
    """Counts the work of a bundle's graphs, of each once; None if the bundle holds no graphs."""
    if not {graph_file("planning"), graph_file("fidelity")} <= bundle.manifest.files.keys():
        return None

    def count(graph: str, rows: int) -> int:
        held = graph if graph_file(graph) in bundle.manifest.files else str(substitute(graph))
        return macs_of_graph(bundle.folder / graph_file(held), bundle.manifest.signature.sizes(rows)).linear

    return cache(count)


def _work(run: LatestRun, count: Count) -> float:
    """Multiply-accumulates of a run as a share of those without a gate."""
    whole = run.schedule.calls * count("planning", 2 if run.guided else 1)
    return work_of(run.actions, 1, guided=run.guided, count=count) / whole


def label_of(gate: Gate) -> str:
    """The label of a gate; it names what follows the gate unless that is the default."""
    if gate == Gate(after=gate.after):
        return "vanilla"
    if gate != Gate(gate.step, gate.after):
        return f"gate {gate}"
    step = f"gate step {gate.step}" if noise_of(gate.step) is None else f"gate {gate.step}"
    return step + ("" if gate.mode == DEFAULT_AFTER_GATE else f", {gate.mode}")
