"""Ways to condition a UNet, each against eager diffusers without a gate, and against an eager loop that is gated by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError, UnsupportedError

from ..conftest import TINY_SD, write_configs, write_pipeline
from .conftest import eager_pipeline, quiet
from .hand_gated import HandGated, close

STEPS, GATE = 6, 3
CALL: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "blue", "num_inference_steps": STEPS, "output_type": "latent"}
SIZE: dict[str, Any] = {"height": 64, "width": 64}
"""Of the small SDXL, whose pipelines have another default."""
GRAPHS = ("vanilla", "planning", "fidelity")


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Any:
    """A picture of noise."""
    return Image.frombytes(
        "RGB", size, torch.randint(256, (size[0] * size[1] * 3,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes()
    )


def compared(make: Callable[[Any], Any], folder: Path, bundle: Bundle, steps: int = GATE, *, guided: bool = True, **call: Any) -> None:
    """Our pipeline equals eager diffusers without a gate, and one that is gated by hand with it; and the gate changes something.

    Args:
        make: makes the pipeline that is compared from a text to image pipeline.
        folder: of the model.
        bundle: of the model.
        steps: planning steps.
        guided: whether the pipeline guides, so that each call has two halves.
        **call: arguments of the call.
    """

    def draw(pipeline: Any) -> Tensor:
        drawn: Tensor = quiet(make(pipeline))(**CALL | call, generator=torch.Generator().manual_seed(3)).images
        return drawn

    ours = tgate_trt.load(bundle, gate_step="none", threads=1)
    vanilla = draw(eager_pipeline(folder))
    assert close(draw(ours), vanilla)
    ours.unet.gate_step = steps
    by_hand = eager_pipeline(folder)
    by_hand.unet = HandGated(by_hand.unet, steps, guided=guided)
    gated = draw(by_hand)
    assert close(draw(ours), gated)
    assert not close(gated, vanilla), "the gate has no effect, so the comparison shows nothing"


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """A bundle of the small SD that ControlNets and T2I-Adapters may act on."""
    folder = tmp_path_factory.mktemp("bundles") / "controlled"
    return tgate_trt.build(tiny_sd, folder, controls=["controlnet", "t2i-adapter"], graphs=GRAPHS, verify=False)


@pytest.fixture(scope="module")
def controlled_sdxl(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """The same of the small SDXL."""
    folder = tmp_path_factory.mktemp("bundles") / "controlled-sdxl"
    return tgate_trt.build(tiny_sdxl, folder, controls=["controlnet", "t2i-adapter"], graphs=GRAPHS, verify=False)


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The components that further pipelines take."""
    return {
        name: part for name, part in pipeline.components.items() if name not in ("safety_checker", "feature_extractor", "image_encoder")
    }


def control_of(folder: Path, seed: int = 0) -> Any:
    """A ControlNet of a model with random weights, loud."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for name, parameter in net.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def controlnet(folder: Path, count: int, sdxl: bool = False) -> Callable[[Any], Any]:
    import diffusers

    nets = [control_of(folder, seed) for seed in range(count)]
    kind = diffusers.StableDiffusionXLControlNetPipeline if sdxl else diffusers.StableDiffusionControlNetPipeline
    more: dict[str, Any] = {} if sdxl else {"safety_checker": None, "feature_extractor": None}
    return lambda pipeline: kind(**parts_of(pipeline), controlnet=nets if count > 1 else nets[0], **more)


@pytest.mark.parametrize("count", [1, 2])
def test_controlnet(tiny_sd: Path, controlled: Bundle, count: int) -> None:
    images = [picture(index) for index in range(count)]
    compared(controlnet(tiny_sd, count), tiny_sd, controlled, image=images if count > 1 else images[0])


def test_controlnet_in_some_steps_alone(tiny_sd: Path, controlled: Bundle) -> None:
    compared(controlnet(tiny_sd, 1), tiny_sd, controlled, image=picture(0), control_guidance_end=0.4)


def test_controlnet_of_sdxl(tiny_sdxl: Path, controlled_sdxl: Bundle) -> None:
    compared(controlnet(tiny_sdxl, 1, sdxl=True), tiny_sdxl, controlled_sdxl, image=picture(0), **SIZE)


def test_a_bundle_for_controls_draws_without_them(tiny_sd: Path, controlled: Bundle) -> None:
    compared(lambda pipeline: pipeline, tiny_sd, controlled)


def test_a_controlnet_of_another_family_is_refused(tiny_sd: Path, tiny_sdxl: Path, controlled: Bundle) -> None:
    from diffusers import ControlNetModel

    net = control_of(tiny_sd)
    config = dict(net.config) | {"layers_per_block": 2}
    other = ControlNetModel.from_config(config)
    pipeline = controlnet(tiny_sd, 1)(tgate_trt.load(controlled, threads=1))
    pipeline.controlnet = other
    with pytest.raises(GateError, match="gives 6 of 'down_block_additional_residuals', and this model takes 4: they are of another model"):
        quiet(pipeline)(**CALL, image=picture(0))


def test_a_bundle_without_controls_names_the_option(tiny_sd: Path, sd_bundle: Bundle) -> None:
    pipeline = controlnet(tiny_sd, 1)(tgate_trt.load(sd_bundle, threads=1))
    with pytest.raises(UnsupportedError, match="--control controlnet"):
        quiet(pipeline)(**CALL, image=picture(0))


def test_t2i_adapter(tiny_sd: Path, controlled: Bundle) -> None:
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")

    def make(pipeline: Any) -> Any:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionAdapterPipeline(**parts_of(pipeline), adapter=adapter, **more)

    compared(make, tiny_sd, controlled, image=picture(1))


# IP-Adapters


def with_adapter(folder: Path) -> Any:
    """The small SD with an IP-Adapter of random weights, loud, and an image encoder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from tgate_trt.ip_adapter import add

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=24
    )
    pipeline = eager_pipeline(folder)
    add(pipeline.unet, [{"tokens": 4, "width": 24}])
    for name, parameter in pipeline.unet.named_parameters():
        if "_ip." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection(vision).eval(), feature_extractor=extractor)
    return quiet(pipeline)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """A bundle of the small SD with an IP-Adapter, whose graphs are compared with eager PyTorch at its build."""
    folder = tmp_path_factory.mktemp("bundles") / "adapted"
    return tgate_trt.build(with_adapter(tiny_sd), folder, graphs=GRAPHS, backend=["onnxruntime", "pytorch"], components=False)


def test_an_ip_adapter(tiny_sd: Path, adapted: Bundle) -> None:
    call = CALL | {"ip_adapter_image": picture(4)}

    def draw(pipeline: Any, scale: float) -> Tensor:
        pipeline.set_ip_adapter_scale(scale)
        drawn: Tensor = pipeline(**call, generator=torch.Generator().manual_seed(3)).images
        return drawn

    for backend in ("onnxruntime", "pytorch"):
        ours = quiet(tgate_trt.load(adapted, gate_step="none", threads=1, backend=backend))
        gated = quiet(tgate_trt.load(adapted, gate_step=GATE, threads=1, backend=backend))
        drawn = []
        for scale in (1.0, 0.4):  # between runs
            vanilla, by_hand = with_adapter(tiny_sd), with_adapter(tiny_sd)
            assert close(draw(ours, scale), draw(vanilla, scale))
            by_hand.unet = HandGated(by_hand.unet, GATE)
            drawn.append(draw(by_hand, scale))
            assert close(draw(gated, scale), drawn[-1])
        assert not close(*drawn)


def test_the_scale_of_an_ip_adapter_stays_within_a_run(adapted: Bundle) -> None:
    pipeline = quiet(tgate_trt.load(adapted, gate_step=GATE, threads=1))

    def change(pipe: Any, step: int, _t: Any, values: Any) -> Any:
        pipe.set_ip_adapter_scale(0.5 if step else 1.0)
        return values

    with pytest.raises(GateError, match="changed within a run"):
        pipeline(**CALL, ip_adapter_image=picture(4), callback_on_step_end=change)
    with pytest.raises(UnsupportedError, match="one scale for all layers"):
        next(each for each in pipeline.unet.attn_processors.values() if hasattr(each, "scale")).scale = [0.3]
        pipeline(**CALL, ip_adapter_image=picture(4))


def test_an_ip_adapter_on_a_bundle_without_one_is_refused(tiny_sd: Path, sd_bundle: Bundle) -> None:
    pipeline = with_adapter(tiny_sd)
    pipeline.unet = tgate_trt.load(sd_bundle, threads=1).unet
    embeds = [torch.randn(2, 1, 24)]
    with pytest.raises(UnsupportedError, match="do not take 'image_embeds'; build one from a pipeline with the IP-Adapter loaded"):
        pipeline(**CALL, ip_adapter_image_embeds=embeds)


# Images, masks, text and guidance


@pytest.mark.parametrize(("strength", "gate"), [(1.0, 3), (0.5, 2), (0.2, 1)])
def test_image_to_image(tiny_sd: Path, sd_bundle: Bundle, strength: float, gate: int) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    def make(pipeline: Any) -> Any:
        return StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)

    if strength == 0.2:  # one step, which is a planning step: nothing to gate
        with pytest.raises(AssertionError, match="no effect"):
            compared(make, tiny_sd, sd_bundle, gate, image=picture(2), strength=strength)
        return
    compared(make, tiny_sd, sd_bundle, gate, image=picture(2), strength=strength)


def test_inpainting_with_four_channels(tiny_sd: Path, sd_bundle: Bundle) -> None:
    compared(inpainting, tiny_sd, sd_bundle, image=picture(3), mask_image=mask(), strength=1.0)


def test_inpainting_with_nine_channels(tmp_path: Path) -> None:
    configs = {name: dict(data) for name, data in TINY_SD.items()}
    configs["unet/config.json"] |= {"in_channels": 9}
    configs["model_index.json"] |= {"_class_name": "StableDiffusionInpaintPipeline"}
    folder = write_pipeline(tmp_path / "inpainting", write_configs(tmp_path / "configs", configs))
    bundle = tgate_trt.build(folder, tmp_path / "bundle", graphs=GRAPHS, verify=False)
    compared(lambda pipeline: pipeline, folder, bundle, image=picture(3), mask_image=mask(), strength=1.0)


def inpainting(pipeline: Any) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)


def mask() -> Any:
    return Image.frombytes("L", (64, 64), bytes([255 if index % 64 < 32 else 0 for index in range(64 * 64)]))


@pytest.mark.parametrize("tokens", [20, 154, 231])
def test_prompts_of_any_length(tiny_sd: Path, sd_bundle: Bundle, tokens: int) -> None:
    generator = torch.Generator().manual_seed(9)
    positive, negative = (torch.randn(1, tokens, 32, generator=generator) for _ in range(2))
    embeds = {"prompt": None, "negative_prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    compared(lambda pipeline: pipeline, tiny_sd, sd_bundle, **embeds)


def test_text_of_another_width_is_refused(sd_bundle: Bundle) -> None:
    wide = torch.randn(1, 77, 48)
    with pytest.raises(GateError, match=r"'encoder_hidden_states' of shape .*the call gives \[2, 77, 48\]"):
        quiet(tgate_trt.load(sd_bundle, threads=1))(
            **CALL | {"prompt": None, "negative_prompt": None}, prompt_embeds=wide, negative_prompt_embeds=wide
        )


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_steps_of_ones_own(request: pytest.FixtureRequest, model: str) -> None:
    from diffusers import EulerDiscreteScheduler

    folder, bundle = request.getfixturevalue(f"tiny_{model}"), request.getfixturevalue(f"{model}_bundle")
    more = SIZE if model == "sdxl" else {}

    def make(pipeline: Any) -> Any:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    compared(make, folder, bundle, timesteps=[901, 700, 500, 300, 150, 20], guidance_rescale=0.6, **more)


def test_noise_levels_of_ones_own(tiny_sdxl: Path, sdxl_bundle: Bundle) -> None:
    sigmas = [12.0, 6.0, 3.0, 1.5, 0.7, 0.2]
    compared(lambda pipeline: pipeline, tiny_sdxl, sdxl_bundle, sigmas=sigmas, num_inference_steps=None, **SIZE)


@pytest.mark.parametrize("parts", ["base", "refiner"])
def test_a_run_that_two_pipelines_share(tiny_sdxl: Path, sdxl_bundle: Bundle, parts: str) -> None:
    """The base draws the first part of the steps, and another pipeline the rest; each has a gate of its own."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    if parts == "base":
        compared(lambda pipeline: pipeline, tiny_sdxl, sdxl_bundle, 2, denoising_end=0.7, num_inference_steps=8, **SIZE)
    else:

        def make(pipeline: Any) -> Any:
            return StableDiffusionXLImg2ImgPipeline(**pipeline.components)

        compared(make, tiny_sdxl, sdxl_bundle, 2, denoising_start=0.5, num_inference_steps=8, image=latents)


def test_a_fraction_is_of_the_steps_that_a_pipeline_draws(tiny_sdxl: Path, sdxl_bundle: Bundle) -> None:
    pipeline = quiet(tgate_trt.load(sdxl_bundle, gate_step=0.5, threads=1))
    pipeline(**CALL | SIZE | {"num_inference_steps": 10}, denoising_end=0.6)
    schedule = pipeline.unet.latest_run.schedule
    assert (schedule.steps, schedule.gate_step) == (6, 3)


def test_a_model_without_guidance_as_turbo(tiny_sdxl: Path, sdxl_bundle: Bundle) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    def make(pipeline: Any) -> Any:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        return pipeline

    compared(make, tiny_sdxl, sdxl_bundle, 1, guided=False, guidance_scale=0.0, num_inference_steps=8, **SIZE)


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_schedulers_of_playground(tiny_sdxl: Path, sdxl_bundle: Bundle, scheduler: str) -> None:
    import diffusers

    def make(pipeline: Any) -> Any:
        pipeline.scheduler = getattr(diffusers, scheduler)(sigma_data=0.5, sigma_max=80.0, sigma_min=0.002, prediction_type="epsilon")
        return pipeline

    compared(make, tiny_sdxl, sdxl_bundle, **SIZE)


def test_three_predictions_are_refused(tiny_sd: Path, sd_bundle: Bundle, tmp_path: Path) -> None:
    import diffusers

    pipeline: Any = diffusers.StableDiffusionPAGPipeline(**eager_pipeline(tiny_sd).components, requires_safety_checker=False)
    pipeline.unet = tgate_trt.load(sd_bundle, threads=1).unet
    with pytest.raises(UnsupportedError, match="'attn_processors' can change"):
        quiet(pipeline)(**CALL, pag_scale=3.0)
    configs = {name: dict(data) for name, data in TINY_SD.items()}
    configs["unet/config.json"] |= {"in_channels": 8}
    configs["model_index.json"] |= {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
    folder = write_pipeline(tmp_path / "ip2p", write_configs(tmp_path / "configs", configs))
    edits = tgate_trt.load(tgate_trt.build(folder, tmp_path / "bundle", verify=False), threads=1)
    with pytest.raises(UnsupportedError, match="StableDiffusionInstructPix2PixPipeline guides by three predictions"):
        quiet(edits)(**CALL, image=picture(5))
