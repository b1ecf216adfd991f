"""Tiny random Stable Diffusion in torch, built from diffusers' and transformers' own classes; and its conversion.

`make_pipeline` is as small as may be. `make_standard_pipeline` keeps to the settings that a single file implies, of
Stable Diffusion 1 or 2.
"""

from pathlib import Path

import conversion
import numpy as np
import torch
from clip_vocabulary import vocabulary, write_vocabulary
from commands import Answer
from conversion import randomize
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jaxdiff import FlaxStableDiffusionPipeline
from jaxdiff.io.adapters import Adapter, write_adapter
from jaxdiff.recipes.custom_diffusion import base_hash

SIDE = 16
"""Pixels of the latents on a side; pictures have twice as many."""
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""What Stable Diffusion's own scheduler_config.json says."""


def make_unet(**changes) -> UNet2DConditionModel:
    """Make a latent UNet of two levels, the upper one with transformers."""
    settings = {
        "sample_size": SIDE,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    torch.manual_seed(0)
    return randomize(UNet2DConditionModel(**{**settings, **changes}), 0.02)


def make_autoencoder(**changes) -> AutoencoderKL:
    """Make an autoencoder of two levels."""
    settings = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 2 * SIDE,
    }
    torch.manual_seed(1)
    return randomize(AutoencoderKL(**{**settings, **changes}), 0.02)


def make_pipeline(folder: Path, scheduler=None, **unet) -> StableDiffusionPipeline:
    """Make a whole pipeline and write it to a folder."""
    write_vocabulary(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(2)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=make_autoencoder(),
        text_encoder=randomize(text_encoder, 0.02),
        tokenizer=tokenizer,
        unet=make_unet(**unet),
        scheduler=scheduler or PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


STANDARD: dict[str, dict] = {
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
    "scheduler": SCHEDULER,
}
PARTS = {
    "unet": lambda **settings: randomize(UNet2DConditionModel(**settings)),
    "vae": lambda **settings: randomize(AutoencoderKL(**settings)),
    "text_encoder": lambda **settings: randomize(CLIPTextModel(CLIPTextConfig(**settings))),
    "scheduler": PNDMScheduler,
}
STANDARD_V2 = {
    "unet": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "text_encoder": {"hidden_act": "gelu"},
    "scheduler": {"prediction_type": "v_prediction"},
}


def make_standard_pipeline(folder: Path, version: int = 1, **changes: dict) -> StableDiffusionPipeline:
    """Make a pipeline whose settings a single file implies; `changes` are settings of its parts."""
    torch.manual_seed(version)
    changes = {part: {**(STANDARD_V2.get(part, {}) if version == 2 else {}), **changes.get(part, {})} for part in PARTS}
    # OpenCLIP pads with token 0.
    pad = "!" if version == 2 else "<|endoftext|>"
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(folder / "vocabulary"), pad_token=pad)
    parts = {part: make(**{**STANDARD[part], **changes[part]}) for part, make in PARTS.items()}
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def convert(*words: object) -> Answer:
    """Run the conversion in this process."""
    return conversion.convert(*words, kind="stable_diffusion")


def converted(*words: object) -> Answer:
    """Run the conversion, which must succeed."""
    answer = convert(*words)
    assert answer.code == 0, answer
    return answer


def two_adapters(folder, deltas_of):
    """Write a tiny model and two adapters of it, <one> and <two>; return the folder, and all three as they are.

    Args:
      folder: exists.
      deltas_of: from parameters, a word and its number to the matrices of its adapter.
    """
    make_pipeline(folder / "model")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder / "model")
    sha256 = base_hash(params, pipeline.tokenizer.vocab_size)
    rng = np.random.default_rng(1)
    adapters = []
    for number, word in enumerate(("<one>", "<two>")):
        rows = {word: np.float32(rng.standard_normal((1 + number, 32)))}
        adapters.append(Adapter(sha256, rows, deltas_of(params, word, number)))
        write_adapter(folder / f"{number}.safetensors", adapters[-1])
    return folder, pipeline, params, adapters
