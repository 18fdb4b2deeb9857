"""Scores a pipeline's pictures by program: `python -m tgate_trt.demo.evaluate [MODEL_DIR]`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from tgate_trt.demo import GUIDANCE_SCALE, MODEL_DIR, NUM_INFERENCE_STEPS
from tgate_trt.demo.dataset import ATTRIBUTES, Captioned, examples
from tgate_trt.demo.scorer import read
from tgate_trt.errors import InputError, TGateError


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total`.

    Raises:
        ValueError: when `total` is not positive, or `correct` lies outside of it.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total < 1:
            raise ValueError(f"correct must lie in 0…total and total be at least 1; got {self.correct} of {self.total}")

    @property
    def fraction(self) -> float:
        """The share that is correct, 0…1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval of the true share, at 95 % (Wilson, 1927)."""
        z, n, p = 1.959964, self.total, self.fraction
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        margin = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        return min(p, max(0.0, middle - margin)), max(p, min(1.0, middle + margin))  # against rounding where p is 0 or 1

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.fraction:.1%} ({low:.1%}…{high:.1%})"

    def to_json(self) -> dict[str, Any]:
        """The counts, the share and its interval."""
        return {"correct": self.correct, "total": self.total, "fraction": self.fraction, "interval": list(self.interval)}


@dataclass(frozen=True)
class Score:
    """How many pictures show what their captions say."""

    overall: Proportion
    """Pictures with every attribute right."""
    attributes: dict[str, Proportion]
    """For each attribute, pictures that have it right."""

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file of results."""
        return {"overall": self.overall.to_json(), "attributes": {name: share.to_json() for name, share in self.attributes.items()}}


def pictures_of(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch_size: int = 16,
    **settings: Any,
) -> list[Image.Image]:
    """Generates a picture for each prompt.

    Args:
        pipeline: any diffusers pipeline from prompts to pictures, called as it stands, scheduler and denoiser included.
        prompts: what to generate.
        num_inference_steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
        seed: picture i starts from the noise of `seed + i`, whatever the batch size.
        batch_size: prompts in one call.
        settings: more keywords of the pipeline's call, such as `height`.
    """
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        pictures += pipeline(
            list(batch),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
            **settings,
        ).images
    return pictures


def score(pictures: Sequence[Image.Image | npt.NDArray[np.uint8]], captioned: Sequence[Captioned]) -> Score:
    """Reads pictures back and compares each with its caption.

    Args:
        pictures: as `tgate_trt.demo.scorer.read` takes them.
        captioned: what each must show.
    """
    agreements = [read(picture).agreement(example.combination) for picture, example in zip(pictures, captioned, strict=True)]
    return Score(
        overall=Proportion(sum(all(agreement.values()) for agreement in agreements), len(agreements)),
        attributes={name: Proportion(sum(agreement[name] for agreement in agreements), len(agreements)) for name in ATTRIBUTES},
    )


def evaluate(pipeline: Any, captioned: Sequence[Captioned], **settings: Any) -> Score:
    """Generates a picture for each caption and reads it back.

    Args:
        pipeline: see `pictures_of`.
        captioned: what to generate and to expect; `tgate_trt.demo.dataset.examples` draws some.
        settings: the keywords of `pictures_of`.
    """
    return score(pictures_of(pipeline, [example.caption for example in captioned], **settings), captioned)


def load_pipeline(folder: Path) -> Any:
    """The diffusers pipeline in a folder, read without the network, its progress bar off.

    Raises:
        InputError: when the folder holds none.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no diffusers pipeline: expected a model_index.json in it")
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline.")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the scheduler.")] = NUM_INFERENCE_STEPS,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = GUIDANCE_SCALE,
    samples: Annotated[int, typer.Option(min=1, help="Captions of each side of the split; at most all of it.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the captions and of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions in one call.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no table.")] = False,
) -> None:
    """Counts the pictures that show what their captions say, for captions held out of training and for training's own."""
    console = Console()
    try:
        pipeline = load_pipeline(model)
    except TGateError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False)
        sys.exit(1)
    scores = {
        name: evaluate(
            pipeline,
            examples(samples, held_out=held_out, seed=seed),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=batch_size,
        )
        for name, held_out in (("held out", True), ("training", False))
    }
    if as_json:
        settings = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        print(json.dumps(settings | {name: score.to_json() for name, score in scores.items()}, indent=2))
        return
    table = Table("captions", "fully right", *ATTRIBUTES, caption="with 95 % intervals")
    for name, score in scores.items():
        table.add_row(f"{name}, {score.overall.total}", str(score.overall), *map(str, score.attributes.values()))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
