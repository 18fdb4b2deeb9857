"""The bodies of OpenAI's images API, as this server takes and gives them. Fields that it does not know are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tgate_trt.serve.limits import Limits
from tgate_trt.serve.picture import LARGEST_SEED

LIMITS = Limits()

Format = Literal["png", "jpeg", "webp"]


class Strict(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Drawn(Strict):
    """What generations and edits have in common."""

    prompt: Annotated[str, Field(min_length=1, max_length=LIMITS.prompt, description="What to draw.")]
    model: Annotated[str | None, Field(max_length=256, description="Of GET /v1/models; the first if left out.")] = None
    n: Annotated[int, Field(ge=1, le=LIMITS.images, description="Pictures; each has the next seed.")] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT, or auto.")] = "auto"
    response_format: Annotated[Literal["b64_json", "url"], Field(description="url gives a data: URL.")] = "b64_json"
    output_format: Format = "png"
    user: Annotated[str | None, Field(max_length=256, description="Taken and not used.")] = None
    stream: Annotated[bool, Field(description="Send events: partial images, then the picture.")] = False
    partial_images: Annotated[int, Field(ge=0, le=LIMITS.previews, description="Of each picture, in a stream.")] = 0
    seed: Annotated[int | None, Field(ge=0, le=LARGEST_SEED, description="Of the first picture; random if left out.")] = None
    negative_prompt: Annotated[str | None, Field(max_length=LIMITS.prompt, description="What not to draw.")] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=LIMITS.steps, description="The model's own if left out.")] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False, description="The model's own if left out.")] = None
    gate: Annotated[
        str | int | float | None,
        Field(description="A whole gate in text form, such as 10 or 7,after=positive,forecast=2; the model's own."),
    ] = None
    after_gate: Annotated[Literal["negative", "positive", "fading"] | None, Field(description="From the gate on.")] = None


class Generation(Drawn):
    """Body of POST /v1/images/generations. JSON has types, so a number in a string is none."""

    model_config = ConfigDict(strict=True)


class Edit(Drawn):
    """Fields of POST /v1/images/edits beside the files ``image`` and ``mask``."""

    strength: Annotated[float | None, Field(gt=0, le=1, description="How much of the picture is drawn anew; diffusers' own.")] = None


class Seconds(BaseModel):
    """Where the time of a request went, summed over its pictures."""

    queue: float
    encode: float
    planning: float
    fidelity: float
    hand_off: float
    forecast: float
    decode: float
    previews: float
    waiting: Annotated[float, Field(description="For other batches; a part of the others.")]
    total: float


class TokensOfInput(BaseModel):
    """What was read."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What a request took. A picture is not made of tokens: ``output_tokens`` is 0."""

    input_tokens: int
    input_tokens_details: TokensOfInput
    output_tokens: int
    total_tokens: int
    seconds: Seconds
    steps: Annotated[dict[str, int], Field(description="Calls of the denoiser by action: planning, fidelity, forecast.")]


class ImageData(BaseModel):
    """One picture of an answer: either its bytes in base64 or a data: URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Images(BaseModel):
    """An answer that is no stream."""

    created: int
    data: list[ImageData]
    output_format: Format
    size: str
    usage: Usage


class Streamed(BaseModel):
    """What both events of a stream have."""

    b64_json: str
    image_index: Annotated[int, Field(description="Of the n pictures, from 0.")]
    created_at: int
    size: str
    output_format: Format
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class PartialImage(Streamed):
    """An event of a stream: a picture that is not finished."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class Completed(Streamed):
    """An event of a stream: a picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    seed: int
    usage: Usage


class Model(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tgate-trt"] = "tgate-trt"
    size: Annotated[str, Field(description="By default, WIDTHxHEIGHT.")]
    widths: Annotated[str, Field(description="Pixels: one number, or MIN:DEFAULT:MAX.")]
    heights: Annotated[str, Field(description="The same.")]
    abilities: list[str]
    backend: str
    steps: Annotated[int, Field(description="By default.")]
    guidance_scale: Annotated[float | None, Field(description="By default.")]
    gate: Annotated[str, Field(description="By default.")]
    gates: Annotated[list[str], Field(description="Names of gates that the bundle holds.")]


class Models(BaseModel):
    """Body of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """Body of every answer that is an error."""

    error: Problem


class State(BaseModel):
    """Body of GET /healthz and /readyz."""

    status: str
