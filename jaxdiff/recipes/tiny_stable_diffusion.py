"""A Stable Diffusion with few, random parameters: it draws noise, by the code that draws pictures."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdiff.io.digit_captions import caption_vocabulary
from jaxdiff.io.tokenizer import BEGIN, END, CLIPTokenizer
from jaxdiff.io.weights import flatten_params, unflatten_params
from jaxdiff.models.autoencoder import AutoencoderConfig
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.conditional_unet import ConditionalUNetConfig
from jaxdiff.recipes.diffusers_scheduler import translate_scheduler
from jaxdiff.recipes.pretrained import FlaxCLIPTextModel
from jaxdiff.recipes.pretrained_diffusion import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from jaxdiff.recipes.pretrained_model import cast
from jaxdiff.recipes.pretrained_pipeline import FlaxStableDiffusionPipeline
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion

WIDTH = 64
UNET = ConditionalUNetConfig(
    sample_size=16,
    block_out_channels=(32, 64),
    attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=WIDTH,
    num_attention_heads=(4, 4),
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=64)
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""Stable Diffusion's."""


def tiny_models(dtypes: Mapping[str, DTypeLike]) -> tuple[dict[str, Any], StableDiffusion]:
    """Return the networks by name, without parameters, and the whole; `dtypes` is what each computes in."""
    vocab, _ = caption_vocabulary()
    text = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=vocab[BEGIN],
        eos_token_id=vocab[END],
    )
    models: dict[str, Any] = {
        "text_encoder": FlaxCLIPTextModel(text, dtype=dtypes["text_encoder"], _do_init=False),
        "unet": FlaxUNet2DConditionModel(UNET, dtype=dtypes["unet"], _do_init=False),
        "vae": FlaxAutoencoderKL(AUTOENCODER, dtype=dtypes["vae"], _do_init=False),
    }
    text_encoder, unet, vae = (model.module for model in models.values())
    return models, StableDiffusion(text_encoder, unet, vae, *translate_scheduler("the scheduler", SCHEDULER))


def make_tiny(dtype: DTypeLike, decode_dtype: DTypeLike) -> tuple[FlaxStableDiffusionPipeline, Params]:
    """Return the pipeline, which draws 64x64 pixels, and its parameters, the same at every call.

    Args:
      dtype: of text encoder and UNet.
      decode_dtype: of the autoencoder.
    """
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": decode_dtype}
    models, model = tiny_models(dtypes)
    rng = np.random.default_rng(0)
    params = {part: cast(draw_params(found.params_shape_tree, rng), dtypes[part]) for part, found in models.items()}
    return FlaxStableDiffusionPipeline(
        **models, tokenizer=CLIPTokenizer(*caption_vocabulary()), model=model, files={}
    ), params


def draw_params(shapes: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return normal kernels that keep about the variance of what comes in, scales of 1 and biases of 0."""
    params = {}
    for name, leaf in flatten_params(shapes).items():
        kind = name.split(".")[-1]
        fan_in = max(1, math.prod(leaf.shape[:-1])) if kind == "kernel" else 1
        value = np.full(leaf.shape, float(kind == "scale"), np.float32)
        if kind in ("kernel", "embedding"):
            value = rng.standard_normal(leaf.shape, np.float32) / np.float32(math.sqrt(fan_in))
        params[name] = jnp.asarray(value)
    return unflatten_params(params)
