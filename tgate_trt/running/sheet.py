"""The files of pictures: one picture, a folder of them, or a sheet that shows several gates side by side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tgate_trt.errors import InputError
from tgate_trt.files import replacing
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE
from tgate_trt.running.drawing import Column, Drawing

FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of each kind of file that pictures are written to."""

_EXIF_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769

_CELL = 256
"""Smallest side of a picture on a sheet, in pixels."""
_MARGIN, _LINE = 14, 18


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
    gates = [{"gate_step": column.gate.boundary, "after_gate": column.gate.mode, "gate": str(column.gate)} for column in columns]
    return json.dumps({"software": f"tgate-trt {metadata.version('tgate-trt')}", **common, "pictures": pictures, "gates": gates})


def sheet(columns: Sequence[Column], captions: Sequence[str]) -> Image.Image:
    """All pictures in one image: a row for each picture, under its caption, and a column for each gate, above what it took."""
    width, height = columns[0].pictures[0].size
    scale = max(1.0, _CELL / min(width, height))
    size = round(width * scale), round(height * scale)
    font, bold = ImageFont.load_default(size=13), ImageFont.load_default(size=17)
    heads = [(_in_words(column),) for column in columns]
    feet = [(_time(column, columns[0]), _work(column)) for column in columns]
    widest = max(font.getlength(line) for lines in (*heads, *feet) for line in lines)
    across, down = max(size[0], round(widest)) + _MARGIN, size[1] + _LINE + _MARGIN
    head, foot = 3 * _LINE + _MARGIN, 2 * _LINE + _MARGIN
    page_width = max(len(columns) * across, *(round(font.getlength(caption)) for caption in captions)) + _MARGIN
    page = Image.new("RGB", (page_width, head + len(captions) * down + foot), "white")
    canvas = ImageDraw.Draw(page)
    for y, caption in enumerate(captions):
        canvas.text((_MARGIN, head + y * down), f"“{caption}”", "dimgray", font)
    for x, column in enumerate(columns):
        left = _MARGIN + x * across
        canvas.text((left, _MARGIN), _title(column), "black", bold)
        canvas.text((left, _MARGIN + _LINE + 6), heads[x][0], "dimgray", font)
        for y, picture in enumerate(column.pictures):
            page.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, head + y * down + _LINE))
        for line, text in enumerate(feet[x]):
            canvas.text((left, head + len(captions) * down + line * _LINE), text, "black", font)
    return page


def _title(column: Column) -> str:
    is_plain = column.gate.step != NONE and column.gate == Gate(column.gate.step, column.gate.after)
    return f"T-GATE, {column.label}" if is_plain else column.label


def _in_words(column: Column) -> str:
    """What the gate means, in a line."""
    where = f"all {column.steps}" if column.gate.boundary == NONE else f"the first {column.planning_steps} of {column.steps}"
    return f"text and guidance in {where} steps"


def _time(column: Column, first: Column) -> str:
    each = f"{column.seconds / len(column.pictures):.2f} s a picture"
    return each if column is first else f"{each}, {column.seconds / first.seconds:.0%} of the first column's"


def _work(column: Column) -> str:
    return "" if column.work is None else f"{column.work:.0%} of vanilla's work"


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
