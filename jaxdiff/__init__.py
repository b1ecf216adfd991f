"""jaxdiff: diffusion models in functional JAX and Flax, one command a job."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "NoiseSchedule": "diffusion.schedule",
    "make_schedule": "diffusion.schedule",
    "timestep_spacing": "diffusion.timesteps",
    "with_final": "diffusion.timesteps",
    "sample": "diffusion.samplers",
    "DDIM": "diffusion.samplers",
    "DDPM": "diffusion.samplers",
    "Euler": "diffusion.edm",
    "Heun": "diffusion.edm",
    "DPMSolverMultistep": "diffusion.multistep",
    "UniPC": "diffusion.multistep",
    "PNDM": "diffusion.multistep",
    "invert": "diffusion.inversion",
    "slerp": "diffusion.interpolation",
    "guide": "diffusion.guidance",
    "UNet": "models.unet",
    "UNetConfig": "models.unet",
    "load_pretrained_unet": "recipes.pretrained_unet",
    "CLIPConfig": "models.clip_config",
    "CLIPTextConfig": "models.clip_config",
    "CLIPVisionConfig": "models.clip_config",
    "FlaxCLIPModel": "recipes.pretrained",
    "FlaxCLIPTextModel": "recipes.pretrained",
    "FlaxCLIPTextModelWithProjection": "recipes.pretrained",
    "FlaxCLIPVisionModel": "recipes.pretrained",
    "FlaxCLIPVisionModelWithProjection": "recipes.pretrained",
    "FlaxUNet2DConditionModel": "recipes.pretrained_diffusion",
    "FlaxAutoencoderKL": "recipes.pretrained_diffusion",
    "FlaxStableDiffusionPipeline": "recipes.pretrained_pipeline",
}
"""Public names and the modules they live in; importing jaxdiff alone imports none of them, nor jax."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxdiff.{_HOMES[name]}"), name)
