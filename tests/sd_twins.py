"""Tiny pipelines of diffusers in the layouts of Stable Diffusion 1.x and 2.x, and conversions as a user runs them."""

import sys
from pathlib import Path

import pytest
import torch
from clip_vocabulary import vocabulary, write_vocabulary
from commands import Answer, run_here
from conversion import randomize
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weights_convert import __main__

SINGLE_V2 = {
    "unet": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
    },
    "text_encoder": {"hidden_act": "gelu"},
    "scheduler": {"prediction_type": "v_prediction"},
}


def make_pipeline(folder: Path, version: int = 1, **changes: dict) -> StableDiffusionPipeline:
    """Make a pipeline whose settings a single file implies; `changes` are settings of its parts."""
    torch.manual_seed(version)
    changes = {part: {**(SINGLE_V2.get(part, {}) if version == 2 else {}), **changes.get(part, {})} for part in PARTS}
    # OpenCLIP pads with token 0.
    pad = "!" if version == 2 else "<|endoftext|>"
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), pad_token=pad)
    parts = {part: make(**{**SETTINGS[part], **changes[part]}) for part, make in PARTS.items()}
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


SETTINGS: dict[str, dict] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
    },
    "vae": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "vocab_size": len(vocabulary()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    },
}
PARTS = {
    "unet": lambda **settings: randomize(UNet2DConditionModel(**settings)),
    "vae": lambda **settings: randomize(AutoencoderKL(**settings)),
    "text_encoder": lambda **settings: randomize(CLIPTextModel(CLIPTextConfig(**settings))),
    "scheduler": PNDMScheduler,
}


def convert(*words: object) -> Answer:
    """Run the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["weights_convert", "stable_diffusion", *map(str, words)])
        return run_here(lambda _: __main__.main())


def converted(*words: object) -> Answer:
    """Run the command, which must succeed."""
    answer = convert(*words)
    assert answer.code == 0, answer
    return answer


def refused(answer: Answer, *parts: str):
    """Check that a conversion was refused in one sentence with these parts."""
    assert answer.code == 2, answer
    assert answer.err.startswith("python -m weights_convert stable_diffusion: error: ")
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err
