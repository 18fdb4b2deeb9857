"""Scores: their arithmetic, and a pipeline that draws by program scored like any other."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tgate_trt.demo.dataset import draw, examples, parse
from tgate_trt.demo.evaluate import Proportion, evaluate, load_pipeline, score
from tgate_trt.errors import InputError


@dataclass
class Draughtsman:
    """A pipeline that draws what a caption says, every circle as a square."""

    calls: int = 0

    def __call__(self, prompt: list[str], *, generator: list[torch.Generator], **settings: Any) -> SimpleNamespace:
        assert len(generator) == len(prompt)
        self.calls += 1
        drawn = [replace(wanted, shape="square") if wanted.shape == "circle" else wanted for wanted in map(parse, prompt)]
        return SimpleNamespace(images=[draw(combination) for combination in drawn])


def test_what_is_drawn_wrong_is_counted_wrong_and_nothing_else() -> None:
    captioned = examples(50, held_out=True)
    circles = sum(example.combination.shape == "circle" for example in captioned)
    pipeline = Draughtsman()
    score = evaluate(pipeline, captioned, batch_size=16)
    assert 0 < circles < 50
    assert pipeline.calls == 4
    assert score.overall == Proportion(50 - circles, 50)
    assert score.attributes["shape"] == Proportion(50 - circles, 50)
    assert all(share == Proportion(50, 50) for name, share in score.attributes.items() if name != "shape")


def test_pictures_and_arrays_score_alike() -> None:
    captioned = examples(20, held_out=True)
    pictures = Draughtsman()([example.caption for example in captioned], generator=[torch.Generator()] * 20).images
    assert score([np.asarray(picture) for picture in pictures], captioned) == score(pictures, captioned)
    assert score(pictures, captioned[::-1]).overall.correct < 10


def test_the_interval_is_wilsons() -> None:
    low, high = Proportion(81, 263).interval  # the example of Newcombe, 1998, table I
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (0, 50), (7, 9), (50, 50)])
def test_an_interval_holds_its_share_and_stays_a_share(correct: int, total: int) -> None:
    share = Proportion(correct, total)
    low, high = share.interval
    assert 0 <= low <= share.fraction <= high <= 1
    assert high - low > 0


@pytest.mark.parametrize(("correct", "total"), [(2, 1), (-1, 3), (0, 0)])
def test_a_proportion_that_cannot_be_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        Proportion(correct, total)


def test_a_folder_without_a_pipeline_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no diffusers pipeline: expected a model_index\.json"):
        load_pipeline(tmp_path)


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    training = ["--device", "abacus", "--output", str(tmp_path / "model")]
    for module, arguments in (("evaluate", [str(tmp_path)]), ("training.train", training)):
        run = subprocess.run([sys.executable, "-m", f"tgate_trt.demo.{module}", *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "error: " in run.stderr
        assert "Traceback" not in run.stderr
