"""Scores a pipeline's pictures by program: `python -m tgate_trt.demo.evaluate [MODEL_DIR]`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image
from rich.table import Table

from tgate_trt.console import console, reporting
from tgate_trt.demo import GUIDANCE_SCALE, MODEL_DIR, NUM_INFERENCE_STEPS
from tgate_trt.demo.dataset import ATTRIBUTES, Captioned, examples
from tgate_trt.demo.scorer import read
from tgate_trt.errors import InputError
from tgate_trt.running.drawing import Drawing, draw, prepare


@dataclass(frozen=True)
class Proportion:
    """`correct` out of `total`.

    Raises:
        ValueError: if `total` is below 1, or `correct` is outside of 0…`total`.
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
    """The numbers of pictures that match their captions."""

    overall: Proportion
    """Pictures that have every attribute right."""
    attributes: dict[str, Proportion]
    """By attribute, the pictures that have it right."""

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file of results."""
        return {"overall": self.overall.to_json(), "attributes": {name: share.to_json() for name, share in self.attributes.items()}}


def score(pictures: Sequence[Image.Image | npt.NDArray[np.uint8]], captioned: Sequence[Captioned]) -> Score:
    """Reads pictures back and compares each with its caption.

    Args:
        pictures: see `tgate_trt.demo.scorer.read`.
        captioned: what each picture must show.
    """
    agreements = [read(picture).agreement(example.combination) for picture, example in zip(pictures, captioned, strict=True)]
    return Score(
        overall=Proportion(sum(all(agreement.values()) for agreement in agreements), len(agreements)),
        attributes={name: Proportion(sum(agreement[name] for agreement in agreements), len(agreements)) for name in ATTRIBUTES},
    )


def evaluate(
    pipeline: Any,
    captioned: Sequence[Captioned],
    *,
    steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch_size: int = 16,
) -> Score:
    """Generates a picture for each caption and reads it back.

    Args:
        pipeline: any diffusers pipeline from prompts to pictures, called as it is, with its own scheduler and denoiser.
        captioned: what to generate and to expect; see `tgate_trt.demo.dataset.examples`.
        steps: sampling steps.
        guidance_scale: scale of classifier-free guidance.
        seed: picture i starts from the noise of ``seed + i``.
        batch_size: captions in one call.
    """
    drawing = Drawing(tuple(example.caption for example in captioned), steps=steps, guidance_scale=guidance_scale, seed=seed)
    return score([picture for batch in drawing.batches(batch_size) for picture in draw(pipeline, batch)], captioned)


def load_pipeline(folder: Path) -> Any:
    """Loads the diffusers pipeline in a folder, without the network, and turns its progress bar off.

    Raises:
        InputError: if the folder holds no pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no diffusers pipeline: expected a model_index.json in it; choose another folder")
    from diffusers import DiffusionPipeline

    return prepare(DiffusionPipeline.from_pretrained(folder, local_files_only=True), None)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline.")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = NUM_INFERENCE_STEPS,
    guidance_scale: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = GUIDANCE_SCALE,
    samples: Annotated[int, typer.Option(min=1, help="Captions from each side of the split, or all of them if there are fewer.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the captions and of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions in one call.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Counts the pictures that match their captions, for captions held out of training and for captions of the training set."""
    with reporting(verbose=False):
        pipeline = load_pipeline(model)
        sides = {name: examples(samples, held_out=name == "held out", seed=seed) for name in ("held out", "training")}
        scores = {
            name: evaluate(pipeline, side, steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size)
            for name, side in sides.items()
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
