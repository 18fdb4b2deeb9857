"""Networks that measure pictures, tiny and with random weights, in the files that a user would name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tgate_trt.models.stand_in_tokenizer import save_clip

_VOCABULARY = 600
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "vocab_size": _VOCABULARY,
    "bos_token_id": _VOCABULARY - 2,
    "eos_token_id": _VOCABULARY - 1,
}


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP in transformers' format with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path / "clip"
    CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_clip(folder, _TEXT, model_max_length=77, pad_with_first=False)
    return folder


class Inception(nn.Module):
    """Scales bytes to 299 and to -1…1 itself, and gives features or, if not asked for them, probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 9, stride=8)

    def forward(self, picture: Tensor, return_features: bool = False) -> Tensor:
        """Features or probabilities `[N, 8]` of bytes `[N, 3, height, width]`."""
        scaled = nn.functional.interpolate(picture.float(), size=[299, 299], mode="bilinear")
        features = self.convolution(scaled / 127.5 - 1).relu().mean((2, 3))
        return features if return_features else features.softmax(1)


@pytest.fixture
def inception() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture
def inception_file(inception: Inception, tmp_path: Path) -> Path:
    """`inception` as TorchScript."""
    file = tmp_path / "inception.pt"
    torch.jit.save(torch.jit.script(inception), file)
    return file
