"""The whole pipeline against diffusers' torch pipeline, from the same weights, prompts and starting noise."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from clip_vocabulary import vocabulary, write_vocabulary
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from stable_diffusion_twins import SCHEDULER, SIDE, make_pipeline, make_standard_pipeline, make_unet
from transformers import CLIPTokenizer

from jaxdiff import FlaxStableDiffusionPipeline, FlaxUNet2DConditionModel
from jaxdiff.errors import InputError
from jaxdiff.io.weights import read_safetensors, write_safetensors
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes.diffusers_scheduler import read_scheduler
from jaxdiff.recipes.stable_diffusion import encode_texts, make_latent_sampler, make_process

pytestmark = pytest.mark.usefixtures("quick_commands")
PROMPTS = ["a photo of a cat", "a digit, a digit!!"]
BETAS = {name: SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return FlaxStableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoded(loaded):
    """The texts of the prompts, and that of no prompt."""
    pipeline, params = loaded
    encode = jax.jit(lambda ids: encode_texts(pipeline.model, params, ids))
    return tuple(encode(jnp.asarray(pipeline.prepare_inputs(text))) for text in (PROMPTS, ""))


def noise(count: int = 2) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 4, SIDE, SIDE), np.float32)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TRAILING = {**BETAS, "timestep_spacing": "trailing"}
LINSPACE = {**BETAS, "timestep_spacing": "linspace"}
SCHEDULERS = {
    "pndm": PNDMScheduler(**SCHEDULER),
    "ddim": DDIMScheduler(**LEADING, clip_sample=False, set_alpha_to_one=False),
    "ddim, v, clean end": DDIMScheduler(**LEADING, clip_sample=False, prediction_type="v_prediction"),
    "euler": EulerDiscreteScheduler(**LEADING),
    "heun": HeunDiscreteScheduler(**LEADING),
    "euler, linspace": EulerDiscreteScheduler(**LINSPACE),
    "euler, trailing": EulerDiscreteScheduler(**TRAILING),
    "heun, linspace": HeunDiscreteScheduler(**LINSPACE),
    "dpm++2m, leading": DPMSolverMultistepScheduler(**LEADING),
    "dpm++2m, linspace": DPMSolverMultistepScheduler(**LINSPACE),
    "dpm++2m, trailing": DPMSolverMultistepScheduler(**TRAILING),
    "unipc, leading": UniPCMultistepScheduler(**LEADING),
    "unipc, linspace": UniPCMultistepScheduler(**LINSPACE),
    "unipc, trailing": UniPCMultistepScheduler(**TRAILING),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name[:4] in ("pndm", "ddim") else pytest.mark.slow) for name in SCHEDULERS]
)
def test_latents_are_those_of_diffusers(folder, loaded, encoded, tmp_path, name):
    assert_same_latents(folder, loaded, encoded, tmp_path, SCHEDULERS[name])


PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.2.2",
    **BETAS,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""What the scheduler_config.json of Stable Diffusion 1.4 says, which names no spacing."""
OTHERS = {
    "ddim": (DDIMScheduler, {}, None),
    "euler": (EulerDiscreteScheduler, {}, None),
    "heun": (HeunDiscreteScheduler, {}, None),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, None),
    "unipc": (UniPCMultistepScheduler, {}, None),
    "euler, karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "karras"),
    "heun, trailing": (HeunDiscreteScheduler, {"timestep_spacing": "trailing"}, "trailing"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("euler", "heun", "heun, trailing") else ())
        for name in OTHERS
    ],
)
def test_another_sampler_is_that_of_from_config(folder, loaded, encoded, tmp_path, name):
    kind, options, spacing = OTHERS[name]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(PUBLISHED))
    scheduler = kind.from_config(PNDMScheduler.from_pretrained(tmp_path).config, **options)
    assert_same_latents(folder, loaded, encoded, tmp_path, scheduler, name.split(",")[0], spacing)


@pytest.mark.parametrize(
    "spacing", ["linspace", *(pytest.param(name, marks=pytest.mark.slow) for name in ("leading", "trailing"))]
)
def test_euler_ancestral_is_that_of_diffusers_with_the_same_noise(
    folder, loaded, encoded, tmp_path, monkeypatch, spacing
):
    scheduler = EulerAncestralDiscreteScheduler(**{**LEADING, "timestep_spacing": spacing})
    keys, drawn = jax.random.split(jax.random.key(0), 2), itertools.count(1)

    def draw(shape, **_):
        number = next(drawn)
        ours = [jax.random.normal(jax.random.fold_in(key, number), (SIDE, SIDE, 4)) for key in keys]
        return torch.from_numpy(np.moveaxis(np.stack(ours), -1, 1).copy())

    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", draw)
    assert_same_latents(folder, loaded, encoded, tmp_path, scheduler)
    assert next(drawn) == 11


@pytest.mark.usefixtures("unchecked")
def test_a_model_whose_sampler_is_missing_is_drawn_with_another(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    LMSDiscreteScheduler(**BETAS).save_pretrained(path.parent)
    with pytest.raises(InputError, match=r"is LMSDiscreteScheduler, which .* choose --sampler ddim, ddpm, eu"):
        FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="sampler='euler_a': must be one of ddim, ddpm, euler, "):
        FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "model", sampler="euler_a")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "model", sampler="euler")
    theirs = StableDiffusionPipeline.from_pretrained(
        folder, scheduler=EulerDiscreteScheduler.from_pretrained(path.parent)
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, num_inference_steps=3, latents=torch.from_numpy(noise()), output_type="np").images
    found = pipeline(pipeline.prepare_inputs(PROMPTS), params, jax.random.key(0), 3, latents=noise()).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def assert_same_latents(folder, loaded, encoded, place, scheduler, sampler=None, spacing=None):
    """Compare one's latents with those of diffusers; without a sampler, save the scheduler and read it."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
    theirs.set_progress_bar_config(disable=True)
    if not sampler:
        scheduler.save_pretrained(place)
    expected = theirs(
        PROMPTS, num_inference_steps=10, guidance_scale=7.5, latents=torch.from_numpy(noise()), output_type="latent"
    ).images.numpy()
    diffusion, defaults, own = read_scheduler(place / "scheduler_config.json")
    pipeline, params = loaded
    model = replace(pipeline.model, diffusion=diffusion, defaults=defaults, sampler=own)
    sample = make_latent_sampler(model, make_process(model, sampler, 10, spacing), 7.5, make_mesh(1))
    x_T = jnp.transpose(noise(), (0, 2, 3, 1))
    sampled = sample(params["unet"], x_T, jax.random.split(jax.random.key(0), 2), *encoded)
    assert float(expected.std()) > 1
    assert int(sampled.broken_at) == 0
    np.testing.assert_allclose(np.moveaxis(sampled.latents, -1, 1), expected, rtol=0, atol=1e-3)


def test_pictures_are_those_of_diffusers(folder, loaded):
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, num_inference_steps=10, latents=torch.from_numpy(noise()), output_type="np").images
    pipeline, params = loaded
    found = pipeline(pipeline.prepare_inputs(PROMPTS), params, jax.random.key(0), 10, latents=noise()).images
    assert found.shape == (2, 2 * SIDE, 2 * SIDE, 3)
    assert float(expected.std()) > 0.05
    assert float(np.mean(np.square(255 * (found - expected)))) < 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_to_avoid_and_other_sizes_are_those_of_diffusers(folder, loaded):
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(4).standard_normal((1, 4, 8, 12), np.float32)
    expected = theirs(
        PROMPTS[:1],
        negative_prompt=["it"],
        height=16,
        width=24,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=torch.from_numpy(latents),
        output_type="np",
    ).images
    ours, params = loaded
    found = ours(
        ours.prepare_inputs(PROMPTS[0]),
        params,
        jax.random.key(0),
        5,
        height=16,
        width=24,
        guidance_scale=3.0,
        latents=latents,
        neg_prompt_ids=ours.prepare_inputs("it"),
    ).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_prompt_that_cannot_be_drawn_is_refused(loaded):
    pipeline, params = loaded
    ids, key = pipeline.prepare_inputs(PROMPTS), jax.random.key(0)
    spoiled = noise()
    spoiled[1, 0, 0, 0] = np.nan
    for options, sentence in (
        ({"latents": noise(3)}, "latents: shape"),
        ({"latents": spoiled}, "latents: not all numbers are finite"),
        ({"guidance_scale": np.array([7.5, 3.0])}, "one number for all pictures is needed, got [3.0, 7.5]"),
        ({"neg_prompt_ids": pipeline.prepare_inputs(["a"] * 3)}, "3 texts to avoid for 2 prompts"),
        ({"height": 31}, "height must be a multiple of 2 pixels, got 31"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            pipeline(ids, params, key, 2, **options)


def test_numbers_that_are_not_finite_stop_the_drawing(loaded):
    pipeline, params = loaded
    ids, key = pipeline.prepare_inputs(PROMPTS), jax.random.key(0)

    def spoil(part: str, leaf: str):
        tree = {**params[part], leaf: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params[part][leaf])}
        return {**params, part: tree}

    with pytest.raises(InputError, match="not finite after step 1 of 2, at timestep 501: lower"):
        pipeline(ids, spoil("unet", "conv_out"), key, 2)
    with pytest.raises(InputError, match="the decoded pictures are not finite"):
        pipeline(ids, spoil("vae", "post_quant_conv"), key, 2)


@pytest.mark.slow
def test_half_precision_draws_nearly_the_same(folder, loaded):
    pipeline, params = loaded
    half, half_params = FlaxStableDiffusionPipeline.from_pretrained(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params["unet"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params["vae"])} == {jnp.dtype(jnp.float32)}
    ids, key = pipeline.prepare_inputs(PROMPTS), jax.random.key(0)
    exact, rounded = (
        one(ids, of, key, 5, latents=noise()).images for one, of in ((pipeline, params), (half, half_params))
    )
    # bfloat16 keeps 8 bits: 0.4 % of a number, at each of the network's some ten layers.
    assert 0 < np.sqrt(np.mean(np.square(exact - rounded))) < 0.1 * exact.std()


@pytest.mark.parametrize("num_steps", [7, 60, 75, 80, 300])
def test_a_published_scheduler_takes_any_number_of_steps(loaded, num_steps):
    theirs = PNDMScheduler(**SCHEDULER)
    theirs.set_timesteps(num_steps)
    walk = make_process(loaded[0].model, None, num_steps).timesteps
    # PNDM of diffusers visits its second timestep twice.
    np.testing.assert_array_equal(walk[:-1], -np.unique(-theirs.timesteps.numpy()))


def test_a_script_of_old_runs_as_it_is(folder):
    # With a sampler that draws noise along the way too.
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder, sampler="euler-ancestral")
    devices = jax.device_count()
    prompt_ids = pipeline.prepare_inputs(["a photo of a cat"] * devices)
    replicated = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), params)
    sharded = prompt_ids.reshape(devices, 1, -1)
    seeds = jax.random.split(jax.random.PRNGKey(0), devices)
    images = pipeline(sharded, replicated, seeds, 3, jit=True).images
    assert images.shape == (devices, 1, 2 * SIDE, 2 * SIDE, 3)
    pictures = pipeline.numpy_to_pil(images)
    assert len(pictures) == devices
    assert pictures[0].size == (2 * SIDE, 2 * SIDE)
    held = pipeline._placed
    pipeline(sharded, replicated, seeds, 3, jit=True)
    assert pipeline._placed is held  # not copied again
    # One device draws what each of eight draws.
    alone = pipeline(prompt_ids[:1], params, seeds[2], 3).images
    np.testing.assert_allclose(images[2], alone, rtol=0, atol=1e-4)
    assert np.abs(images[2] - images[3]).max() > 0.01


def test_the_size_that_old_files_say_wrongly_is_that_of_diffusers(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "unet" / "config.json"
    for version, size in (("0.6.0", 32), ("0.8.1", 96), ("0.9.0", 32), ("0.10.2", 32)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": version, "sample_size": size}))
        theirs = StableDiffusionPipeline.from_pretrained(copy)
        pipeline, _ = FlaxStableDiffusionPipeline.from_pretrained(copy)
        assert pipeline.model.default_size == theirs.unet.config.sample_size * theirs.vae_scale_factor


@pytest.mark.parametrize("safe", [True, False])
def test_saved_files_give_the_same_parameters(folder, loaded, tmp_path, safe):
    _, params = loaded
    # A folder of diffusers' own Flax training scripts names Flax' scheduler.
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"PNDMScheduler"', '"FlaxPNDMScheduler"'))
    pipeline, _ = FlaxStableDiffusionPipeline.from_pretrained(copy)
    assert pipeline.model == loaded[0].model
    tmp_path = tmp_path / "saved"
    pipeline.save_pretrained(tmp_path, params, safe_serialization=safe)
    kind = "PNDMScheduler" if safe else "FlaxPNDMScheduler"
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == kind
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", kind]
    _, again = FlaxStableDiffusionPipeline.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    if safe:
        theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
        before = StableDiffusionPipeline.from_pretrained(folder)
        for part in ("unet", "vae", "text_encoder"):
            found, wanted = (getattr(one, part).state_dict() for one in (theirs, before))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_stable_diffusion_2_is_that_of_diffusers_and_its_saved_configs_say_all(tmp_path):
    """It needs both of the switches, and its padding."""
    changes = {"upcast_attention": True, "sample_size": 12, "dropout": 0.1}
    twin = make_standard_pipeline(tmp_path, 2, unet=changes, vae={"force_upcast": False, "scaling_factor": 0.2})
    twin.scheduler = DDIMScheduler(**LEADING, clip_sample=False, prediction_type="v_prediction")  # as published for 2.1
    twin.save_pretrained(tmp_path / "in")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "in")
    pipeline.save_pretrained(tmp_path / "out", params)
    before, again = (StableDiffusionPipeline.from_pretrained(tmp_path / place) for place in ("in", "out"))
    free = {"_name_or_path", "_use_default_values", "_diffusers_version"}
    for part in ("unet", "vae"):
        found, expected = ({**getattr(each, part).config} for each in (again, before))
        assert {**found, **dict.fromkeys(free)} == {**expected, **dict.fromkeys(free)}
    assert again.tokenizer.pad_token == "!"
    before.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(5).standard_normal((2, 4, 12, 12), np.float32)
    expected = before(PROMPTS, num_inference_steps=4, latents=torch.from_numpy(latents), output_type="np").images
    found = pipeline(pipeline.prepare_inputs(PROMPTS), params, jax.random.key(0), 4, latents=latents).images
    assert float(expected.std()) > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_padding_of_stable_diffusion_2_outlives_saving(folder, tmp_path):
    """The published folder says so in one file alone."""
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    write_vocabulary(tmp_path / "in" / "tokenizer")
    (tmp_path / "in" / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "in")
    pipeline.save_pretrained(tmp_path / "out", params)
    again, _ = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "out")
    expected = CLIPTokenizer.from_pretrained(tmp_path / "in" / "tokenizer")(
        PROMPTS, padding="max_length", max_length=77
    )
    assert expected["input_ids"][0][-1] == vocabulary()["!"]
    for each in (pipeline, again):
        np.testing.assert_array_equal(each.prepare_inputs(PROMPTS), expected["input_ids"])


def test_an_autoencoder_with_old_names_is_read(folder, loaded, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        return re.sub("|".join(map(re.escape, old)), lambda match: old[match[0]], name)

    tensors = {rename(name): tensor for name, tensor in read_safetensors(path).items()}
    assert any("proj_attn" in name for name in tensors)
    write_safetensors(path, tensors, {"format": "pt"})
    _, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, params["vae"], loaded[1]["vae"])


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_folder_of_variants_alone_is_read_and_said(folder, tmp_path, capsys, variant):
    twin = StableDiffusionPipeline.from_pretrained(folder).to(torch.float16 if variant == "fp16" else torch.float32)
    twin.save_pretrained(tmp_path, variant=variant)
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    capsys.readouterr()
    _, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}/{part}: no plain weights found, so {name}.{variant}.safetensors is read"
        for part, name in (
            ("text_encoder", "model"),
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
        )
    ]
    assert params["unet"]["conv_in"]["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(params["unet"]["conv_in"]["bias"], twin.unet.conv_in.bias.detach().float().numpy())
    _, asked = FlaxStableDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    assert not capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, params, asked)


def test_the_plain_file_comes_before_a_variant_unless_that_is_asked_for(folder, loaded, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "in")
    twin = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        twin.conv_in.bias.add_(1)
    # In shards, whose index has the word in another place.
    twin.save_pretrained(tmp_path / "in" / "unet", variant="non_ema", max_shard_size="300kB")
    assert (tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors.index.non_ema.json").is_file()
    for options, more in ({}, 0), ({"variant": "non_ema"}, 1):
        _, params = FlaxUNet2DConditionModel.from_pretrained(tmp_path / "in", subfolder="unet", **options)
        np.testing.assert_array_equal(params["conv_in"]["bias"], loaded[1]["unet"]["conv_in"]["bias"] + more)
    assert not capsys.readouterr().out
    sentence = "holds no weights; looked for diffusion_pytorch_model.fp16.safetensors, "
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/in/unet: {sentence}")):
        FlaxUNet2DConditionModel.from_pretrained(tmp_path / "in", subfolder="unet", variant="fp16")
    with pytest.raises(InputError, match=r"variant='\.\./x' is no word"):
        FlaxUNet2DConditionModel.from_pretrained(tmp_path / "in", subfolder="unet", variant="../x")


@pytest.mark.parametrize("name", ["folder", "someone/some-model"])
def test_options_that_are_not_known_are_refused_by_name(folder, tmp_path, name):
    place = folder if name == "folder" else name
    for kind, where in (FlaxStableDiffusionPipeline, place), (FlaxUNet2DConditionModel, place):
        for option in ("scheduler", "torch_dtype"):
            with pytest.raises(InputError, match=f"{option}= is an option that jaxdiff does not have") as found:
                kind.from_pretrained(where, **{option: "a secret"})
            assert "a secret" not in str(found.value)
    if name == "folder":
        options = {"cache_dir": tmp_path, "token": False, "local_files_only": True}
        FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options)
        FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_auth_token=False)
    with pytest.raises(InputError, match="safety_checker and feature_extractor must be None"):
        FlaxStableDiffusionPipeline.from_pretrained(place, safety_checker=torch.nn.Identity())


def test_numbers_beyond_float16_are_refused_by_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(read_safetensors(path))
    tensors["conv_in.bias"] = np.full_like(tensors["conv_in.bias"], 70000)
    write_safetensors(path, tensors, {"format": "pt"})
    with pytest.raises(InputError, match=r"conv_in\.bias holds numbers too large for float16: use bfloat16 or float32"):
        FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "in", dtype=jnp.float16)
    _, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "in", dtype=jnp.bfloat16)
    assert params["unet"]["conv_in"]["bias"].dtype == jnp.bfloat16
    assert params["vae"]["encoder"]["conv_in"]["bias"].dtype == jnp.float32


MEASURE = """
import sys
from pathlib import Path
import jax.numpy as jnp
from jaxdiff import FlaxUNet2DConditionModel
from jaxdiff.io.hub import open_model
from jaxdiff.io.pretrained_files import read_config

def load(folder):
    fetch = open_model(folder)
    config = FlaxUNet2DConditionModel.read_config(read_config(folder, fetch))
    model = FlaxUNet2DConditionModel(config, _do_init=False)
    model.params_shape_tree
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before = peak()
    params = model.read_params(folder, fetch, dtype=jnp.bfloat16)
    return peak() - before

def peak():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

load(sys.argv[1])  # all that is imported and started once
print(load(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_narrow_parameters_are_never_wide_in_memory(tmp_path):
    """Read in a child process, from files that are twice as wide."""
    make_unet().save_pretrained(tmp_path / "tiny")
    changes = {"block_out_channels": (128, 256, 384), "layers_per_block": 2}
    changes |= {"down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D")}
    changes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
    twin = make_unet(**changes)
    twin.save_pretrained(tmp_path / "large")
    weights = sum(2 * parameter.numel() for parameter in twin.parameters())
    words = [str(tmp_path / name) for name in ("tiny", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True)
    assert weights > 60e6
    taken = int(done.stdout) / weights
    assert 0.9 < taken < 1.3, taken


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (lambda f: edit(f / "model_index.json", unet=["diffusers", "Other"]), "unet is 'Other'; jaxdiff"),
        (lambda f: edit(f / "model_index.json", vae=None), "vae is None; jaxdiff only has AutoencoderKL"),
        (lambda f: edit(f / "model_index.json", _class_name="AltDiffusionPipeline"), "is 'AltDiffusionPipeline'; jax"),
        (lambda f: edit(f / "model_index.json", controlnet=["diffusers", "X"]), "controlnet is ['diffusers', "),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: cannot be read"),
        (lambda f: shutil.rmtree(f / "vae"), "vae: "),
        (lambda f: shutil.rmtree(f / "unet"), "unet: "),
        (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: "),
        (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler/scheduler_config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "has no tokenizer"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="KarrasVeScheduler"), "has DD"),
        (lambda f: edit(f / "unet" / "config.json", dual_cross_attention=True), "dual_cross_attention is True"),
        (lambda f: edit(f / "unet" / "config.json", magic=1), "magic is 1, but jaxdiff does not know this key"),
        (lambda f: edit(f / "unet" / "config.json", layers_per_block=2), "missing: "),
        (lambda f: edit(f / "vae" / "config.json", latent_channels=3), "out_channels is 4, but the parts around it"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_by_name(folder, tmp_path, spoil, sentence):
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises(InputError, match=re.escape(sentence)):
        FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "copy")


def test_every_sampler_walks_every_spacing_down_to_the_end(loaded):
    model = loaded[0].model
    for sampler in ("pndm", "ddim"):
        for spacing in ("leading", "trailing", "linspace"):
            walk = make_process(model, sampler, 10, spacing).timesteps
            assert (np.diff(walk) < 0).all()
            assert walk[-1] == model.defaults[sampler].final
    assert (np.diff(make_process(model, "ddim", 10, "karras").timesteps) < 0).all()
    with pytest.raises(InputError, match="PNDM takes equal steps only"):
        make_process(model, "pndm", 10, "karras")
