"""Tokenizers for models with random weights: any text gives token ids in the model's range, the same each time.

They have the real vocabularies' sizes and special tokens, but a token is a character: random text encoders know no words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def save_clip(folder: Path, text_config: Mapping[str, Any], *, model_max_length: int, pad_with_first: bool) -> None:
    """Write a stand-in for CLIP's tokenizer.

    Args:
        folder: where a pipeline looks for its tokenizer.
        text_config: of the text encoder that reads its tokens.
        model_max_length: tokens of an encoded prompt.
        pad_with_first: whether to pad with token 0, as SDXL's second text encoder and SD 2 do, instead of the end token.
    """
    from transformers import CLIPTokenizer

    size = text_config["vocab_size"]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<unused-{index}>" for index in range(len(words), size - 2)]
    # CLIP's own order: letters first, the begin and end tokens last. `pooler_output` is taken where the id is largest.
    vocabulary = {word: index for index, word in enumerate([*words[: size - 2], _BEGIN, _END])}
    CLIPTokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token=letters[0] if pad_with_first else _END,
        model_max_length=model_max_length,
    ).save_pretrained(folder)


def save_t5(folder: Path, *, model_max_length: int) -> None:
    """Write a stand-in for T5's tokenizer: pad, end and unknown are tokens 0, 1 and 2, as the model expects."""
    from transformers import T5Tokenizer

    letters = ["▁", *(chr(code) for code in range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    vocabulary += [(f"<unused-{index}>", -100.0) for index in range(len(vocabulary), 32000)]
    vocabulary += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    T5Tokenizer(vocab=vocabulary, model_max_length=model_max_length).save_pretrained(folder)


def _byte_letters() -> list[str]:
    """The printable letter of each byte, in the order of CLIP's vocabulary (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in (*printable, *range(256, 256 + others))]
