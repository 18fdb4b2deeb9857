"""LoRA files in the usual formats: fused as diffusers and peft fuse them, and one sentence for what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.models.lora import Lora, LoraFile, fuse

LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut"]
TEXT = ["q_proj", "out_proj", "fc1"]


def with_adapter(folder: Path, targets: list[str], *, alpha: int, text: bool) -> Any:
    """A tiny pipeline with a random LoRA of rank 3 in its UNet, and in its text encoders."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    for name in ("text_encoder", "text_encoder_2") if text else ():
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=TEXT, init_lora_weights=False))
    return pipeline


def save_as_peft(pipeline: Any, path: Path, *, text: bool) -> None:
    """As diffusers' own training scripts do, with peft's settings in the header."""
    from diffusers.training_utils import _collate_lora_metadata

    keywords = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet)}
    adapted = {"unet": pipeline.unet}
    for name in ("text_encoder", "text_encoder_2") if text else ():
        if getattr(pipeline, name, None) is not None:
            keywords[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(pipeline, name))
            adapted[name] = getattr(pipeline, name)
    pipeline.save_lora_weights(path.parent, **keywords, weight_name=path.name, **_collate_lora_metadata(adapted))


def save_as_kohya(pipeline: Any, path: Path, *, text: bool) -> None:
    """As kohya's scripts do: modules with underscores, an alpha for each."""
    tensors = {}
    parts = {"lora_unet": pipeline.unet}
    if text:
        second = getattr(pipeline, "text_encoder_2", None)
        parts |= {"lora_te": pipeline.text_encoder} if second is None else {"lora_te1": pipeline.text_encoder, "lora_te2": second}
    for prefix, part in parts.items():
        for name, tensor in get_peft_model_state_dict(part).items():
            module, _, factor = name.removesuffix(".weight").rpartition(".")
            if prefix != "lora_unet" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            key = f"{prefix}_{module.replace('.', '_')}"
            tensors[f"{key}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(part.peft_config["default"].lora_alpha))
    save_file(tensors, path)


def fused_by_diffusers(folder: Path, path: Path, scale: float, component: str) -> dict[str, Tensor]:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(getattr(pipeline, name, None), "peft_config", None)]
    pipeline.fuse_lora(lora_scale=scale, components=parts)
    pipeline.unload_lora_weights()
    state: dict[str, Tensor] = getattr(pipeline, component).state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}


def fused_by_us(folder: Path, files: list[LoraFile], component: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    loras = [Lora.read(file, dict(pipeline.unet.config)) for file in files]
    part = getattr(pipeline, component)
    for lora in loras:
        lora.check(component, {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()})
    return dict(fuse(loras, component, ((name, tensor.to(dtype)) for name, tensor in part.state_dict().items())))


def error(own: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert own.keys() == other.keys()
    return max(float((own[name] - other[name]).norm() / other[name].norm().clamp_min(1e-9)) for name in own)


Save = Callable[..., None]


@pytest.mark.parametrize("save", [save_as_peft, save_as_kohya])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_fused_as_diffusers_does(model: str, save: Save, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, path = request.getfixturevalue(model), tmp_path / "style.safetensors"
    pipeline = with_adapter(folder, LINEAR + CONVOLUTIONS, alpha=6, text=True)
    save(pipeline, path, text=True)
    base = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    components = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(base, name, None) is not None]
    for component in components:
        own = fused_by_us(folder, [LoraFile(path, 0.7)], component)
        assert error(own, fused_by_diffusers(folder, path, 0.7, component)) < 1e-5
        assert error(own, dict(getattr(base, component).state_dict())) > 1e-3, "and it changes something"


def test_attention_processors_of_old_files(tiny_sd: Path, tmp_path: Path) -> None:
    """Files of diffusers before peft: ``…processor.to_q_lora.down.weight``, without a prefix."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(with_adapter(tiny_sd, LINEAR, alpha=3, text=False).unet).items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        block, _, projection = module.replace("to_out.0", "to_out").rpartition(".")
        tensors[f"{block}.processor.{projection}_lora.{'down' if factor == 'lora_A' else 'up'}.weight"] = tensor.contiguous()
    plain, prefixed = tmp_path / "plain.safetensors", tmp_path / "prefixed.safetensors"
    save_file(tensors, plain)
    save_file({f"unet.{name}": tensor for name, tensor in tensors.items()}, prefixed)
    expected = fused_by_diffusers(tiny_sd, prefixed, 1.0, "unet")  # diffusers itself reads the prefixed names alone by now
    for path in (plain, prefixed):
        assert error(fused_by_us(tiny_sd, [LoraFile(path)], "unet"), expected) < 1e-5


@pytest.fixture
def style(tiny_sd: Path, tmp_path: Path) -> Path:
    """A LoRA of `tiny_sd`'s attention."""
    path = tmp_path / "style.safetensors"
    save_as_kohya(with_adapter(tiny_sd, LINEAR, alpha=3, text=False), path, text=False)
    return path


def test_two_add_up_and_nothing_is_nothing(tiny_sd: Path, style: Path) -> None:
    base = fused_by_us(tiny_sd, [], "unet")
    once, twice = (fused_by_us(tiny_sd, [LoraFile(style)] * times, "unet") for times in (1, 2))
    for name, tensor in base.items():
        assert torch.allclose(twice[name] - once[name], once[name] - tensor, atol=1e-5)
    none = fused_by_us(tiny_sd, [LoraFile(style, 0.0)], "unet")
    assert all(torch.equal(none[name], base[name]) for name in base)


def test_half_precision_is_rounded_once(tiny_sd: Path, style: Path) -> None:
    base, own = fused_by_us(tiny_sd, [], "unet", torch.float16), fused_by_us(tiny_sd, [LoraFile(style)], "unet", torch.float16)
    lora = Lora.read(LoraFile(style), {})
    for name, (up, down) in lora.factors["unet"].items():
        assert own[name].dtype == torch.float16
        assert torch.equal(own[name], (base[name].float() + (up.flatten(1) @ down.flatten(1)).reshape(base[name].shape)).half())


def test_other_weights_pass_by_untouched(style: Path) -> None:
    tensors = [("conv_in.weight", torch.randn(2, 2)), ("conv_out.weight", torch.randn(2, 2))]
    for (_, before), (_, after) in zip(tensors, fuse([Lora.read(LoraFile(style), {})], "unet", tensors), strict=True):
        assert before is after


@pytest.mark.parametrize(
    ("suffix", "message"),
    [(":loud", "is FILE or FILE:SCALE"), (":nan", "is FILE or FILE:SCALE"), (".gone", "there is no LoRA file")],
)
def test_what_is_no_lora_argument(style: Path, suffix: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraFile.parse(f"{style}{suffix}")


def test_arguments(style: Path) -> None:
    assert LoraFile.parse(str(style)) == LoraFile(style, 1.0)
    assert LoraFile.parse(f"{style}:-0.5") == LoraFile(style, -0.5)
    pickle = style.with_suffix(".bin")
    pickle.write_bytes(b"")
    with pytest.raises(InputError, match="cannot run code"):
        LoraFile.parse(str(pickle))


def test_what_is_no_plain_lora_is_refused(style: Path, tmp_path: Path) -> None:
    tensors = load_file(style)
    module = next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha")
    cases = {
        UnsupportedError: [{**tensors, f"{module}.dora_scale": torch.ones(1)}, {f"{module}.hada_w1_a": torch.ones(2, 2)}],
        InputError: [{"conv_in.weight": torch.ones(2, 2)}, {f"{module}.alpha": torch.ones(())}],
    }
    for kind, files in cases.items():
        for index, file in enumerate(files):
            path = tmp_path / f"{kind.__name__}{index}.safetensors"
            save_file(file, path)
            with pytest.raises(kind, match=str(path)) as caught:
                Lora.read(LoraFile(path), {})
            assert "\n" not in str(caught.value)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(json.dumps({}).encode())
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Lora.read(LoraFile(broken), {})


def test_a_lora_of_another_architecture_is_refused(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    save_as_peft(with_adapter(tiny_sdxl, LINEAR, alpha=3, text=False), path, text=False)
    with pytest.raises(InputError, match=r"does not fit this model: it changes unet.*is it made for another architecture"):
        fused_by_us(tiny_sd, [LoraFile(path)], "unet")
