"""The configs of diffusers in jaxdiff's words, against diffusers' own classes, and everything that is refused."""

import json
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
from conversion import change_json, make_twin
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from jaxdiff.errors import InputError
from jaxdiff.recipes.diffusers_scheduler import WITHOUT_SAMPLER, read_scheduler
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults, unet_shapes
from weights_convert.diffusers_config import translate_unet


@pytest.mark.parametrize(
    ("scheduler", "diffusion", "sampling", "sampler"),
    [
        (DDPMScheduler(variance_type="fixed_large"), ForwardProcess(), SamplingDefaults(), "ddpm"),
        (
            DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", num_train_timesteps=50),
            ForwardProcess("cosine", 50, prediction_type="x_0"),
            SamplingDefaults(),
            "ddpm",
        ),
        (
            DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                clip_sample=False,
            ),
            ForwardProcess("scaled_linear", 1000, 0.00085, 0.012, "v", True),
            SamplingDefaults("trailing", 0, -1, False),
            "ddim",
        ),
        (PNDMScheduler(steps_offset=1), ForwardProcess(), SamplingDefaults("leading", 1, 0, False), "pndm"),
        (EulerDiscreteScheduler(), ForwardProcess(), SamplingDefaults("linspace", 0, -1, False), "euler"),
        (
            EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
            ForwardProcess(),
            SamplingDefaults("trailing", 0, -1, False),
            "euler-ancestral",
        ),
        (
            HeunDiscreteScheduler(),
            ForwardProcess(beta_start=0.00085, beta_end=0.012),
            SamplingDefaults("linspace", 0, -1, False),
            "heun",
        ),
        (
            DPMSolverMultistepScheduler(use_karras_sigmas=True),
            ForwardProcess(),
            SamplingDefaults("karras", 0, -1, False),
            "dpm++2m",
        ),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", timestep_spacing="leading", steps_offset=1),
            ForwardProcess(),
            SamplingDefaults("leading", 1, -1, False),
            "dpm++2m-sde",
        ),
        (UniPCMultistepScheduler(), ForwardProcess(), SamplingDefaults("linspace", 0, -1, False), "unipc"),
    ],
)
def test_schedulers_in_our_words(tmp_path, scheduler, diffusion, sampling, sampler):
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    found, defaults, own = read_scheduler(path)
    assert (found, defaults[own], own) == (diffusion, sampling, sampler)
    # What another class has is left over in many published files.
    change_json(
        path, {"clip_sample": False, "skip_prk_steps": True, "solver_type": "heun"} | json.loads(path.read_text())
    )
    assert read_scheduler(path)[0] == diffusion
    np.testing.assert_allclose(found.make_schedule().alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", WITHOUT_SAMPLER)
def test_a_scheduler_without_a_sampler_here_still_tells_how_the_network_was_trained(tmp_path, name):
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error))
    scheduler.save_pretrained(tmp_path)
    found, defaults, own = read_scheduler(tmp_path / "scheduler_config.json")
    assert own == name
    np.testing.assert_allclose(found.make_schedule().alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)
    other = EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert defaults["euler"].spacing == other.config.timestep_spacing


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trained_betas": [0.1]}, "trained_betas is [0.1]; jaxdiff only has None"),
        ({"thresholding": True}, "thresholding is True; jaxdiff only has False"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; jaxdiff only has 'linear', 'scaled_linear', 'squ"),
        ({"beta_schedule": ["linear"]}, "beta_schedule is ['linear']"),
        (
            {"prediction_type": "flow"},
            "prediction_type is 'flow'; jaxdiff only has 'epsilon', 'sample', 'v_prediction'",
        ),
        ({"variance_type": "learned"}, "variance_type is 'learned'; jaxdiff only has 'fixed_small'"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0; jaxdiff only has 1"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "solver_order is 3; jaxdiff only has 2"),
        ({"sigma_data": 0.5}, "sigma_data is 0.5, but jaxdiff does not know this key"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": "no"}, "set_alpha_to_one is 'no', not bool"),
        (
            {"timestep_spacing": "karras"},
            "timestep_spacing is 'karras'; jaxdiff only has 'leading', 'trailing', 'linspace'",
        ),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', not int"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000, not in 1..100000"),
        ({"beta_end": 2.0}, "betas need 0 < beta_start <= beta_end < 1"),
        ({"steps_offset": 0.5}, "steps_offset is 0.5, not int"),
        ({"rescale_betas_zero_snr": True}, "eps prediction is undefined at zero terminal SNR"),
        (
            {"_class_name": "KarrasVeScheduler"},
            "_class_name is 'KarrasVeScheduler'; jaxdiff only has DDPMScheduler, DD",
        ),
    ],
)
def test_scheduler_configs_that_are_refused(tmp_path, changes, sentence):
    DDPMScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    change_json(path, changes)
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        read_scheduler(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- models


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; jaxdiff only has None"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10; jaxdiff only has None"),
        ({"add_attention": False}, "add_attention is False; jaxdiff only has True"),
        ({"mid_block_scale_factor": 1.41}, "mid_block_scale_factor is 1.41; jaxdiff only has 1"),
        ({"mid_block_type": None}, "mid_block_type is None; jaxdiff only has 'UNetMidBlock2D'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; jaxdiff only has 'silu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; jaxdiff only has 'positional'"),
        ({"center_input_sample": True}, "center_input_sample is True; jaxdiff only has False"),
        ({"downsample_type": "resnet"}, "downsample_type is 'resnet'; jaxdiff only has 'conv'"),
        ({"new_key": 1}, "new_key is 1, but jaxdiff does not know this key"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "which does not mirror down_block_types"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types has 'SkipDownBlock2D'"),
        ({"down_block_types": 7}, "down_block_types has 7"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'; jaxdiff only has 'default'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None; jaxdiff only has 8 here"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups is 4; jaxdiff only has 8 here"),
        ({"sample_size": None}, "sample_size is None, not the height and width"),
        ({"sample_size": [8, 16]}, "sample_size is [8, 16], not the height and width"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1, got 2"),
        ({"block_out_channels": "16"}, "block_out_channels is '16'"),
        ({"block_out_channels": [16, 20]}, "20 channels do not split into 8 groups"),
        ({"norm_num_groups": 0}, "must all number at least 1"),
        ({"layers_per_block": True}, "layers_per_block is True, not int"),
        ({"attention_head_dim": "8"}, "attention_head_dim is '8', not int"),
        (
            {"_class_name": "UNet2DConditionModel"},
            "_class_name is 'UNet2DConditionModel'; jaxdiff only has UNet2DModel",
        ),
    ],
)
def test_model_configs_that_are_refused(tmp_path, changes, sentence):
    make_twin().save_config(tmp_path)
    path = tmp_path / "config.json"
    change_json(path, changes)
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        translate_unet(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_key_that_is_missing_has_the_default_of_diffusers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 64}))
    with torch.device("meta"):
        theirs = UNet2DModel.from_config(UNet2DModel.load_config(tmp_path))
    config, size = translate_unet(tmp_path / "config.json")
    assert size == 64
    assert sum(leaf.size for leaf in jax.tree.leaves(unet_shapes(config))) == theirs.num_parameters()
    assert (config.attention_head_dim, config.norm_eps) == (theirs.config.attention_head_dim, theirs.config.norm_eps)
