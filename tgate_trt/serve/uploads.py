"""Pictures and fields that a client uploads, decoded within limits and without a file on disk."""

from __future__ import annotations

import io
import warnings
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest

from tgate_trt.errors import InputError
from tgate_trt.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of what is decoded; none of them runs another program or opens another file."""

_IMAGE_FIELDS, _MASK = ("image", "image[]"), "mask"
_MOST_FIELDS, _FIELD_BYTES = 32, 64 * 1024


class _InMemory(MultiPartParser):
    """Keeps files in memory: the body is bounded already, and a full disk fails no request."""

    spool_max_size = 2**40


async def read_form(request: HttpRequest) -> tuple[dict[str, Any], bytes, bytes | None]:
    """The fields, the picture and the mask of a multipart body.

    Raises:
        InputError: if it is no such body, or has other files.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise InputError(f"an edit is sent as multipart/form-data, got {kind or 'no content type'}")
    parser = _InMemory(request.headers, request.stream(), max_files=2, max_fields=_MOST_FIELDS, max_part_size=_FIELD_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InputError(f"the body is no multipart/form-data: {getattr(error, 'message', 'it has no boundary')}") from error
    return await _parts_of(form)


async def _parts_of(form: FormData) -> tuple[dict[str, Any], bytes, bytes | None]:
    files: dict[str, bytes] = {}
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            field = _IMAGE_FIELDS[0] if name in _IMAGE_FIELDS else name
            if field not in (_IMAGE_FIELDS[0], _MASK):
                raise InputError(f"an edit takes the files image and mask, got {name!r}")
            if field in files:
                raise InputError(f"an edit takes one {field}, got several")
            files[field] = await value.read()
        else:
            fields[name] = value
    if _IMAGE_FIELDS[0] not in files:
        raise InputError("an edit needs the file image")
    return fields, files[_IMAGE_FIELDS[0]], files.get(_MASK)


def opened_image(data: bytes, limits: Limits, name: str) -> Image.Image:
    """A picture from an uploaded file, whose pixels are decoded when they are first used; its size is checked now.

    Raises:
        InputError: if it is none of `FORMATS`, damaged as far as its header and sums tell, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > limits.pixels:
                raise InputError(f"{name} has {width}×{height} pixels, and {limits.pixels} are the most; scale it down")
            image.verify()
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is no whole {', '.join(FORMATS)} picture") from error


def encoded_image(image: Image.Image, kind: str) -> bytes:
    """A picture as a file: ``"png"``, ``"jpeg"`` or ``"webp"``."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if kind != "png" else {"compress_level": 3}
    image.save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()
