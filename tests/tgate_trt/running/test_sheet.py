"""The files of pictures, and what a sheet shows beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tgate_trt.errors import InputError
from tgate_trt.gate.gate import Gate
from tgate_trt.running.drawing import Column, Drawing
from tgate_trt.running.sheet import FORMATS, _in_words, _time, _work, check_output, save, sheet


def columns_of(count: int) -> list[Column]:
    pictures = tuple(Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(count))
    return [Column("gate step 2", pictures, 1.0, Gate(2), steps=4, planning_steps=2)]


@pytest.mark.parametrize(("suffix", "kind"), FORMATS.items())
@pytest.mark.parametrize("count", [1, 2])
def test_every_kind_of_file_has_its_settings(suffix: str, kind: str, count: int, tmp_path: Path) -> None:
    drawing = Drawing(tuple(f"prompt {index} ×" for index in range(count)), negative_prompt="blur", steps=4, seed=7, scheduler="ddim")
    (path,) = save(columns_of(count), drawing, tmp_path / f"new/picture{suffix}")
    with Image.open(path) as picture:
        assert picture.format == kind
        text = picture.info.get("parameters") or picture.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    settings = json.loads(text)
    assert settings["pictures"] == [{"prompt": f"prompt {index} ×", "seed": 7 + index} for index in range(count)]
    assert (settings["negative_prompt"], settings["steps"], settings["scheduler"]) == ("blur", 4, "ddim")
    assert settings["gates"] == [{"gate_step": 2, "after_gate": "negative", "gate": "2"}]


def test_a_folder_has_a_file_for_each_picture(tmp_path: Path) -> None:
    paths = save(columns_of(2), Drawing(("a", "b"), seed=3), tmp_path / "folder")
    assert [path.name for path in paths] == ["000-gate-step-2.png", "001-gate-step-2.png"]
    with Image.open(paths[1]) as picture:
        assert json.loads(picture.info["parameters"])["pictures"] == [{"prompt": "b", "seed": 4}]


@pytest.mark.parametrize("name", ["out.bmp", "out.tiff", "folder.png", "file/out.png"])
def test_a_place_that_takes_no_pictures_is_refused_before_drawing(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output"):
        check_output(tmp_path / name)


VANILLA = Column("vanilla", (Image.new("RGB", (64, 64), "red"),) * 2, 2.0, Gate(), steps=25, planning_steps=25, work=1.0)
GATED = Column("gate noise:1.35", (Image.new("RGB", (64, 64), "blue"),) * 2, 1.5, Gate("noise:1.35"), 25, 10, 0.675)


def test_a_sheet_has_large_smooth_pictures() -> None:
    pixels = np.asarray(sheet([VANILLA, GATED], ("a red circle", "a blue square")))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(-1).sum() == 2 * 256 * 256
    edge = Image.new("L", (64, 64), 0)
    edge.paste(255, (32, 0, 64, 64))
    smooth = np.asarray(sheet([Column("x", (edge.convert("RGB"),), 1.0, Gate(), 4, 4)], ("x",)))
    assert ((smooth > 40) & (smooth < 215)).sum() > 256, "pixels between the two sides of the edge"


def test_a_large_picture_keeps_its_size() -> None:
    large = Column("x", (Image.new("RGB", (320, 512), "red"),), 1.0, Gate(), 4, 4)
    assert (np.asarray(sheet([large], ("x",))) == (255, 0, 0)).all(-1).sum() == 320 * 512


def test_a_column_says_what_it_is_and_what_it_took() -> None:
    assert _in_words(VANILLA) == "text and guidance in all 25 steps"
    assert _in_words(GATED) == "text and guidance in the first 10 of 25 steps"
    assert _time(VANILLA, VANILLA) == "1.00 s a picture"
    assert _time(GATED, VANILLA) == "0.75 s a picture, 75% of the first column's"
    assert (_work(VANILLA), _work(GATED)) == ("100% of vanilla's work", "68% of vanilla's work")
    assert _work(columns_of(1)[0]) == ""
