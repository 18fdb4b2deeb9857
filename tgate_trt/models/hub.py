"""Models from the Hugging Face hub: downloaded once, found in its cache afterwards, never unpickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tgate_trt.errors import InputError

_VARIANTS = (None, "fp16")
"""File variants to try; some repositories have half precision only."""
_NOT_NEEDED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def download_pipeline(hub_id: str) -> Path:
    """Folder of a whole diffusers pipeline in the hub's cache.

    Raises:
        InputError: if the hub does not have it, cannot be reached while the cache lacks it, or has pickled weights only.
    """
    from diffusers import DiffusionPipeline

    failures: list[Exception] = []
    with _quiet():
        for variant in _VARIANTS:
            try:
                return Path(DiffusionPipeline.download(hub_id, variant=variant, use_safetensors=True, **_NOT_NEEDED))
            except (OSError, ValueError) as error:  # huggingface_hub's errors are OSErrors, malformed ids ValueErrors
                failures.append(error)
    raise InputError(_sentence(hub_id, failures[0])) from failures[0]


def download_denoiser(hub_id: str) -> Path:
    """Folder of a denoiser that is published alone in a repository.

    Raises:
        InputError: see `download_pipeline`.
    """
    from huggingface_hub import snapshot_download

    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise InputError(_sentence(hub_id, error)) from error
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"the hub's {hub_id} has no {file}, so it cannot be read without unpickling")
    return folder


def _sentence(hub_id: str, error: Exception) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    chain = [error]
    while chain[-1].__cause__ is not None and isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"{hub_id} asks you to accept its licence: do so on its page, then log in with hf auth login"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return f"the hub has no public model {hub_id!r}; check its spelling, or log in with hf auth login if it is private"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else " ".join(str(chain[-1]).split())[:200]
    return (
        f"the model {hub_id!r} is incomplete in the hub's cache and could not be downloaded ({reason}); connect, or give a "
        "diffusers folder or a .safetensors file"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers: each of its warnings here becomes an error of ours or does not matter."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
