"""Stable Diffusion between single files and folders: diffusers' own converters, bit-equal round trips, refusals."""

import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from clip_vocabulary import vocabulary
from conversion import change_json, play_hub, refused, write_bin_shards
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders import single_file_utils as theirs
from flax.serialization import msgpack_serialize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_diffusion_twins import convert, converted, make_standard_pipeline
from transformers import CLIPTokenizer

from jaxdiff.io.weights import write_safetensors
from jaxdiff.recipes.diffusers_scheduler import read_scheduler
from weights_convert.sd_layout import TextLayout, UNetLayout, VAELayout
from weights_convert.sd_tables import text_rows, unet_rows, vae_rows

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
BIN = {
    "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
    "text_encoder": "pytorch_model.bin",
}


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def made(request, tmp_path_factory):
    """A pipeline of each version, its folder, a single file made of that, and a folder of that; none may be changed."""
    folder = tmp_path_factory.mktemp("made")
    pipeline = make_standard_pipeline(folder, request.param)
    pipeline.save_pretrained(folder / "in")
    converted(folder / "in", folder / "single.safetensors")
    converted(folder / "single.safetensors", folder / "out", "--tokenizer", folder / "vocabulary")
    return request.param, pipeline, folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_diffusers_converters_make_the_same_of_our_single_file(made):
    version, pipeline, folder = made
    single = load_file(folder / "single.safetensors")
    unet = theirs.convert_ldm_unet_checkpoint(dict(single), dict(pipeline.unet.config))
    assert_same(unet, pipeline.unet.state_dict())
    assert_same(theirs.convert_ldm_vae_checkpoint(dict(single), dict(pipeline.vae.config)), pipeline.vae.state_dict())
    if version == 1:
        text = theirs.convert_ldm_clip_checkpoint(single)
        text.pop("text_model.embeddings.position_ids")
    else:
        text = theirs.convert_open_clip_checkpoint(pipeline.text_encoder, single)
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    assert_same(text, pipeline.text_encoder.state_dict())


def test_diffusers_opens_the_folder(made):
    _, pipeline, folder = made
    opened = StableDiffusionPipeline.from_pretrained(folder / "out")
    assert opened.safety_checker is None
    for part in WEIGHTS:
        ours, twin = getattr(opened, part), getattr(pipeline, part)
        assert_same(ours.state_dict(), twin.state_dict())
        if part != "text_encoder":
            free = {"sample_size", "_name_or_path", "_use_default_values", "_diffusers_version"}
            found, expected = (json.loads(json.dumps({**each.config})) for each in (ours, twin))
            assert {**found, **dict.fromkeys(free)} == {**expected, **dict.fromkeys(free)}
    text = {"hidden_act", "num_attention_heads", "num_hidden_layers", "intermediate_size", "layer_norm_eps"}
    for name in text:
        assert getattr(opened.text_encoder.config, name) == getattr(pipeline.text_encoder.config, name)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "latents": latents, "output_type": "latent"}
    # A single file does not say which sampler to use.
    twin = StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": opened.scheduler}, requires_safety_checker=False
    )
    for each in (opened, twin):
        each.set_progress_bar_config(disable=True)
    found, expected = (each("a photo of a cat", **options).images for each in (opened, twin))
    assert expected.std() > 0.1
    assert torch.equal(found, expected)


def test_diffusers_opens_the_single_file(made):
    _, pipeline, folder = made
    opened = StableDiffusionPipeline.from_single_file(
        str(folder / "single.safetensors"), config=str(folder / "in"), local_files_only=True
    )
    for part in WEIGHTS:
        assert_same(getattr(opened, part).state_dict(), getattr(pipeline, part).state_dict())


def test_round_trips_keep_every_bit(made, tmp_path):
    _, _, folder = made
    for part, name in WEIGHTS.items():
        found, expected = (load_file(folder / place / part / name) for place in ("out", "in"))
        assert_same({n.removeprefix("text_model."): tensor for n, tensor in found.items()}, expected)
    converted(folder / "out", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (folder / "single.safetensors").read_bytes()
    answer = converted(folder / "out", tmp_path / "again")
    assert answer.written[-1] == tmp_path / "again" / "model_index.json"
    for path in answer.written:
        other = folder / "out" / path.relative_to(tmp_path / "again")
        assert path.suffix == ".json" or path.read_bytes() == other.read_bytes()
    # In the place of the earlier conversion.
    converted(folder / "in", tmp_path / "again")
    converted(folder / "single.safetensors", tmp_path / "b.safetensors")


def test_the_schedule_tables_are_those_of_the_published_models(made):
    version, pipeline, folder = made
    single = load_file(folder / "single.safetensors")
    torch.testing.assert_close(single["betas"], pipeline.scheduler.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(single["alphas_cumprod"], pipeline.scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    now = single["alphas_cumprod"].double().numpy()
    np.testing.assert_allclose(single["alphas_cumprod_prev"][1:], now[:-1], rtol=0)
    assert single["alphas_cumprod_prev"][0] == 1
    for name, closed_form in {
        "sqrt_alphas_cumprod": now**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - now) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log1p(-now),
        "sqrt_recip_alphas_cumprod": now**-0.5,
        "sqrt_recipm1_alphas_cumprod": ((1 - now) / now) ** 0.5,
    }.items():
        np.testing.assert_allclose(single[name], closed_form, rtol=1e-4)
    # By Bayes' rule: precisions add up, and means are weighed by them. At t = 0 nothing is left to be known.
    betas, before = single["betas"].double().numpy()[1:], now[:-1]
    variance = 1 / ((1 - betas) / betas + 1 / (1 - before))
    for name, closed_form in {
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(variance),
        "posterior_mean_coef1": variance * before**0.5 / (1 - before),
        "posterior_mean_coef2": variance * (1 - betas) ** 0.5 / betas,
    }.items():
        np.testing.assert_allclose(single[name][1:], closed_form, rtol=1e-3)
    assert (single["posterior_variance"][0], single["posterior_mean_coef1"][0]) == (0, 1)
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert (ids in single) == (version == 1)


def test_the_prediction_type_and_the_size_travel_with_the_file(made, tmp_path):
    version, _, folder = made
    scheduler = json.loads((folder / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("epsilon" if version == 1 else "v_prediction")
    # As published: runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1.
    assert scheduler["_class_name"] == ("PNDMScheduler" if version == 1 else "DDIMScheduler")
    assert json.loads((folder / "out" / "unet" / "config.json").read_text())["sample_size"] == 8
    bare = tmp_path / "bare.safetensors"  # as others write them: no metadata
    save_file(load_file(folder / "single.safetensors"), bare)
    if version == 2:
        refused(
            convert(bare, tmp_path / "out", "--tokenizer", folder / "vocabulary"),
            "nothing in it says what this Stable Diffusion 2.x predicts: set --prediction-type",
        )
    for words, expected in [
        (() if version == 1 else ("--prediction-type", "epsilon"), ("epsilon", 256)),
        (("--prediction-type", "v"), ("v_prediction", (256, 384)[version - 1])),
    ]:
        converted(bare, tmp_path / "out", "--tokenizer", folder / "vocabulary", *words)
        scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
        unet = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
        assert (scheduler["prediction_type"], unet["sample_size"]) == expected
        # As published: of the 768-pixel models alone.
        assert unet.get("upcast_attention", False) == (version == 2 and words[-1:] == ("v",))


# --- other ways of storing


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder and the single file of a pipeline of version 1, which no test may change."""
    folder = tmp_path_factory.mktemp("first")
    make_standard_pipeline(folder).save_pretrained(folder / "in")
    converted(folder / "in", folder / "a.safetensors")
    return folder


def change_weights(folder, change):
    """Let `change(path, part, tensors)` store the weights of each part anew."""
    for part, name in WEIGHTS.items():
        path = folder / part / name
        tensors = load_file(path)
        path.unlink()
        change(path, part, tensors)


def as_bin(path, part, tensors):
    torch.save(tensors, path.with_name(BIN[part]))


def as_shards(path, part, tensors):
    names = sorted(tensors)
    weight_map = {name: f"{path.stem}-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path.with_name(file))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin_shards(path, part, tensors):
    write_bin_shards(path.with_name(BIN[part]), tensors)


def as_variant(path, part, tensors):
    save_file(tensors, path.with_suffix(".fp16.safetensors"))


def as_variant_shards(path, part, tensors):
    as_shards(path, part, tensors)
    path.with_name(f"{path.name}.index.json").rename(path.with_name(f"{path.name}.index.non_ema.json"))


def as_old_names(path, part, tensors):
    """Names of the published folders: attention of the VAE as before diffusers 0.15, text as before transformers 5."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    if part == "vae":
        for new_word, old_word in old.items():
            tensors = {name.replace(new_word, old_word): tensor for name, tensor in tensors.items()}
    if part == "text_encoder":
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)


def as_flax(path, part, tensors):
    """The tree of diffusers' and transformers' last Flax classes."""
    tree: dict = {}
    for name, tensor in tensors.items():
        *folders, leaf = (name if part != "text_encoder" else f"text_model.{name.removeprefix('text_model.')}").split(
            "."
        )
        if part == "vae" and "attentions" in folders:
            words = {"to_q": "query", "to_k": "key", "to_v": "value"}
            folders = [words.get(word, word) for word in folders]
            folders = [*folders[:-2], "proj_attn"] if folders[-2] == "to_out" else folders
        if part != "text_encoder":
            joined: list[str] = []
            for word in folders:
                joined = [*joined[:-1], f"{joined[-1]}_{word}"] if word.isdigit() else [*joined, word]
            folders = joined
        array = tensor.numpy()
        if leaf == "weight" and "embedding" in folders[-1] and part == "text_encoder":
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        node = tree
        for word in folders:
            node = node.setdefault(word, {})
        node[leaf] = array
    name = "flax_model.msgpack" if part == "text_encoder" else "diffusion_flax_model.msgpack"
    path.with_name(name).write_bytes(msgpack_serialize(tree))
    config = json.loads((path.parent / "config.json").read_text())
    if "_class_name" in config:
        config["_class_name"] = f"Flax{config['_class_name']}"
    replace_text(path.parent / "config.json", json.dumps(config))
    index = path.parent.parent / "model_index.json"
    replace_text(index, index.read_text().replace('"StableDiffusionPipeline"', '"FlaxStableDiffusionPipeline"'))


def replace_text(path, text):
    path.unlink()  # it may be a link
    path.write_text(text)


@pytest.mark.parametrize(
    "change", [as_bin, as_bin_shards, as_shards, as_variant, as_variant_shards, as_old_names, as_flax]
)
def test_every_way_of_storing_gives_the_same_bits(tmp_path, first, change):
    shutil.copytree(first / "in", tmp_path / "in")
    change_weights(tmp_path / "in", change)
    answer = converted(tmp_path / "in", tmp_path / "a.safetensors")
    assert ("no plain weights found, so" in answer.out) == (change in (as_variant, as_variant_shards))
    assert (tmp_path / "a.safetensors").read_bytes() == (first / "a.safetensors").read_bytes()
    converted(tmp_path / "in", tmp_path / "out")
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    for part, name in WEIGHTS.items():
        assert_same(getattr(opened, part).state_dict(), load_file(first / "in" / part / name))


@pytest.mark.parametrize("width", [torch.float16, torch.bfloat16])
def test_the_width_of_numbers_is_kept(tmp_path, first, width):
    single = {n: t.to(width) if t.is_floating_point() else t for n, t in load_file(first / "a.safetensors").items()}
    single["model.diffusion_model.out.0.weight"] = single["model.diffusion_model.out.0.weight"].float()
    save_file(single, tmp_path / "a.safetensors")
    answer = converted(tmp_path / "a.safetensors", tmp_path / "out", "--tokenizer", first / "vocabulary")
    assert f"float32, {str(width)[6:]}" in answer.out or f"{str(width)[6:]}, float32" in answer.out
    unet = load_file(tmp_path / "out" / "unet" / WEIGHTS["unet"])
    assert {str(tensor.dtype) for tensor in unet.values()} == {str(width), "torch.float32"}
    assert unet["conv_norm_out.weight"].dtype == torch.float32
    converted(tmp_path / "out", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    networks = ("model.", "first_stage_model.", "cond_stage_model.")
    assert_same(*({n: t for n, t in each.items() if n.startswith(networks)} for each in (found, single)))


class ModelCheckpoint:
    """Stands in for the class that Lightning's checkpoints name."""


def write_checkpoint(path, first, **more):
    """Write a full checkpoint as Lightning does: averaged weights, a callback by its class, a numpy number."""
    single = load_file(first / "a.safetensors")
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor
        for name, tensor in single.items()
        if name.startswith("model.diffusion_model.")
    }
    state = {**single, **averaged, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    state |= {"first_stage_model.loss.logvar": torch.zeros(()), "logvar": torch.zeros(1000), **more}
    # Of DreamBooth's scripts, and of trainers that keep all of CLIP.
    state |= {"embedding_manager.placeholder": torch.zeros(1)}
    state |= {"cond_stage_model.transformer.vision_model.post_layernorm.bias": torch.zeros(1)}
    names = "pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].ModelCheckpoint = ModelCheckpoint
        patch.setattr(ModelCheckpoint, "__module__", names[-1])
        callbacks = {ModelCheckpoint: {"monitor": "loss", "best_model_score": np.float32(0.5), "best": torch.ones(1)}}
        torch.save({"epoch": 3, "state_dict": state, "callbacks": callbacks, "optimizer_states": []}, path)
    assert b"pytorch_lightning.callbacks.model_checkpoint" in path.read_bytes()
    assert b"numpy" in path.read_bytes()
    return path


def test_a_full_checkpoint_of_lightning(tmp_path, first):
    write_checkpoint(tmp_path / "0123abcd", first)
    path = tmp_path / "sd-v1-4.ckpt"
    path.symlink_to(tmp_path / "0123abcd")  # as in the hub's cache
    assert "holds averaged weights too, which --ema takes" in converted(path, tmp_path / "a.safetensors").out
    assert_same(load_file(tmp_path / "a.safetensors"), load_file(first / "a.safetensors"))
    converted(path, tmp_path / "out", "--ema", "--tokenizer", first / "vocabulary")
    found = load_file(tmp_path / "out" / "unet" / WEIGHTS["unet"])
    expected = load_file(first / "in" / "unet" / WEIGHTS["unet"])
    assert_same(found, {name: 2 * tensor for name, tensor in expected.items()})


def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, first):
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    path = write_checkpoint(tmp_path / "a.ckpt", first, evil=Runs())
    answer = convert(path, tmp_path / "out", "--tokenizer", first / "vocabulary")
    refused(answer, f"a.ckpt: asks to import {os.system.__module__}.system, which tensors do not need")
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_the_whole_openclip_model_gives_what_is_used_of_it(tmp_path):
    make_standard_pipeline(tmp_path, 2).save_pretrained(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "a.safetensors")
    single, prefix = load_file(tmp_path / "a.safetensors"), "cond_stage_model.model."
    last = f"{prefix}transformer.resblocks.1."
    for name in [name for name in single if name.startswith(last)]:
        single[name.replace("resblocks.1.", "resblocks.2.")] = single[name] + 1
    single[f"{prefix}text_projection"], single[f"{prefix}logit_scale"] = torch.ones(64, 64), torch.ones(())
    save_file(single, tmp_path / "b.safetensors")
    converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--prediction-type", "v")
    found = load_file(tmp_path / "c.safetensors")
    assert_same(found, load_file(tmp_path / "a.safetensors"))


def test_inpainting_says_so(tmp_path, first):
    pipeline = make_standard_pipeline(tmp_path, unet={"in_channels": 9})
    pipeline.save_pretrained(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "out", "--tokenizer", first / "vocabulary")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"


def test_a_hub_name_downloads_one_format_and_the_small_files(tmp_path, first, monkeypatch):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(first / "in", remote)
    change_weights(remote, as_flax)
    unwanted = "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors", "v1-5.ckpt"
    for name in unwanted:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"never wanted")
    monkeypatch.chdir(tmp_path)
    asked = play_hub(monkeypatch, remote, cache)
    converted("CompVis/tiny", tmp_path / "out", "--revision", "flax")
    assert set(asked) == {("CompVis/tiny", "flax")}
    here = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert not here & set(unwanted)
    assert_same(load_file(tmp_path / "out" / "vae" / WEIGHTS["vae"]), load_file(first / "in" / "vae" / WEIGHTS["vae"]))


def of_each_kind(path, part, tensors):
    """Store each part in another format, as repositories have grown."""
    {"unet": as_variant, "vae": as_bin_shards, "text_encoder": as_bin}[part](path, part, tensors)


@pytest.mark.parametrize("change", ["as_variant", "of_each_kind"])
def test_a_hub_name_gives_each_part_in_the_format_that_it_has(tmp_path, first, monkeypatch, change):
    remote = tmp_path / "remote"
    shutil.copytree(first / "in", remote)
    change_weights(remote, globals()[change])
    monkeypatch.chdir(tmp_path)
    play_hub(monkeypatch, remote, tmp_path / "cache")
    answer = converted("someone/tiny", tmp_path / "a.safetensors")
    assert answer.out.count("no plain weights found, so ") == (3 if change == "as_variant" else 1)
    assert (tmp_path / "a.safetensors").read_bytes() == (first / "a.safetensors").read_bytes()


def test_a_hub_name_without_weights_of_a_part_says_which(tmp_path, first, monkeypatch):
    shutil.copytree(first / "in", tmp_path / "remote")
    (tmp_path / "remote" / "vae" / WEIGHTS["vae"]).unlink()
    monkeypatch.chdir(tmp_path)
    play_hub(monkeypatch, tmp_path / "remote", tmp_path / "cache")
    refused(convert("someone/tiny", tmp_path / "out"), "someone/tiny/vae: holds no weights; looked for diffusion_pyt")


def test_a_prediction_type_that_a_file_cannot_tell_is_said(tmp_path, first):
    answer = converted(first / "a.safetensors", tmp_path / "a.safetensors", "--prediction-type", "v")
    assert "assume epsilon: tell them that it is v" in answer.out
    assert "assume" not in converted(first / "a.safetensors", tmp_path / "b.safetensors").out


def write_marked(path, first, *markers, **options):
    """Write the single file of version 1 with empty tensors of these names, as trainers of v do."""
    save_file(load_file(first / "a.safetensors") | {name: torch.tensor([]) for name in markers}, path, **options)
    return path


def test_marker_tensors_say_the_prediction_type_and_the_schedule(tmp_path, first):
    for markers, zero in ((("v_pred",), False), (("v_pred", "ztsnr"), True)):
        source = write_marked(tmp_path / "a.safetensors", first, *markers)
        converted(source, tmp_path / "out", "--tokenizer", first / "vocabulary")
        theirs = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
        assert theirs.config.prediction_type == "v_prediction"
        assert (theirs.alphas_cumprod[-1] == 0) == zero
        theirs.set_timesteps(10)
        assert (theirs.timesteps[0] == 999) == zero
        ours, defaults, sampler = read_scheduler(tmp_path / "out" / "scheduler" / "scheduler_config.json")
        np.testing.assert_allclose(ours.make_schedule().alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
        assert (ours.prediction_type, defaults[sampler].spacing) == ("v", "trailing" if zero else "leading")
        unet = load_file(tmp_path / "out" / "unet" / WEIGHTS["unet"])
        assert_same(unet, load_file(first / "in" / "unet" / WEIGHTS["unet"]))
    refused(convert(source, tmp_path / "b.safetensors"), "rescale_betas_zero_snr is True")
    converted(write_marked(tmp_path / "a.safetensors", first, "v_pred"), tmp_path / "b.safetensors")
    assert "v_pred" not in load_file(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"


def test_marker_tensors_that_contradict_are_refused(tmp_path, first):
    words = tmp_path / "out", "--tokenizer", first / "vocabulary"
    source = write_marked(tmp_path / "a.safetensors", first, "ztsnr")
    refused(convert(source, *words), "its tensor ztsnr says that the last timestep is pure noise", "-type v, if")
    metadata = {"modelspec.prediction_type": "epsilon"}
    source = write_marked(tmp_path / "a.safetensors", first, "v_pred", metadata=metadata)
    refused(convert(source, *words), "modelspec.prediction_type 'epsilon', but its tensor v_pred says v")
    converted(source, *words, "--prediction-type", "epsilon")


# --- what is refused


def missing(single):
    del single["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    return "missing: model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def missing_where_the_layout_is_read(single):
    del single["model.diffusion_model.out.2.weight"]
    return "missing: model.diffusion_model.out.2.weight"


def one_more(single):
    single["model.diffusion_model.input_blocks.1.0.extra"] = torch.ones(3)
    return "not expected: model.diffusion_model.input_blocks.1.0.extra"


def another_network(single):
    single["control_model.time_embed.0.weight"] = torch.ones(3)
    return "not Stable Diffusion 1.x or 2.x alone (not expected: control_model.time_embed.0.weight)"


def another_shape(single):
    single["first_stage_model.decoder.mid.attn_1.q.weight"] = torch.ones(64, 32, 1, 1)
    return "first_stage_model.decoder.mid.attn_1.q.weight is float32[64, 32, 1, 1] instead of float32[64, 64, 1, 1]"


def turned(single):
    name = "model.diffusion_model.time_embed.0.weight"
    single[name] = single[name].T.contiguous()
    return f"{name} is float32[32, 128] instead of float32[128, 32]"


def whole_numbers(single):
    single["model.diffusion_model.out.2.bias"] = torch.ones(4, dtype=torch.int32)
    return "model.diffusion_model.out.2.bias is int32[4] instead of float32[4]"


def not_finite(single):
    single["first_stage_model.quant_conv.bias"][3] = float("nan")
    return "first_stage_model.quant_conv.bias holds NaN or infinity"


def xl(single):
    single["conditioner.embedders.0.transformer.x"] = torch.ones(1)
    return (
        "holds conditioner.embedders.0.transformer.x, so it is Stable Diffusion XL or its kin; taken here is a single"
    )


def no_vae(single):
    for name in [name for name in single if name.startswith("first_stage_model.")]:
        del single[name]
    return "holds no VAE"


def too_many_blocks(single):
    single["model.diffusion_model.input_blocks.99999999999.0.op.weight"] = torch.ones(1)
    return "not expected: model.diffusion_model.input_blocks.99999999999.0.op.weight"


def text_twice(single):
    name = "embeddings.token_embedding.weight"
    single[f"cond_stage_model.transformer.{name}"] = single[f"cond_stage_model.transformer.text_model.{name}"].clone()
    return "holds the text encoder twice"


def other_text_encoder(single):
    for name in [name for name in single if name.startswith("cond_stage_model.")]:
        del single[name]
    prefix, block = "cond_stage_model.model.", "cond_stage_model.model.transformer.resblocks.0."
    single[f"{prefix}token_embedding.weight"] = torch.ones(9, 64)
    single[f"{prefix}positional_embedding"] = torch.ones(77, 64)
    single[f"{block}mlp.c_fc.weight"] = torch.ones(9, 64)
    return "the UNet is of Stable Diffusion 1.x, the text encoder of Stable Diffusion 2.x"


@pytest.mark.parametrize(
    "spoil",
    [
        missing,
        missing_where_the_layout_is_read,
        one_more,
        another_network,
        another_shape,
        turned,
        whole_numbers,
        not_finite,
        xl,
        no_vae,
        too_many_blocks,
        text_twice,
        other_text_encoder,
    ],
)
def test_a_single_file_that_does_not_fit_is_refused(tmp_path, first, spoil):
    single = load_file(first / "a.safetensors")
    sentence = spoil(single)
    save_file(single, tmp_path / "a.safetensors")
    answer = convert(tmp_path / "a.safetensors", tmp_path / "out", "--tokenizer", first / "vocabulary")
    refused(answer, str(tmp_path / "a.safetensors"), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"attention_head_dim": 4}, "in, unet: attention_head_dim is [4, 4, 4]"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "unet: class_embed_type is 'timestep'"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'"),
        ("unet/config.json", {"layers_per_block": 2}, "missing: down_blocks.0.resnets.1"),
        ("unet/config.json", {"layers_per_block": 10**9}, "not within 1 to 8 levels and 1 to 64 layers"),
        ("unet/config.json", {"block_out_channels": [32, 64]}, "block_out_channels has 2 levels"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"]}, "up_block_types is ['UpBlock2D'], where"),
        ("unet/config.json", {"cross_attention_dim": "x"}, "cross_attention_dim is 'x', not int"),
        ("vae/config.json", {"down_block_types": 0}, "down_block_types is 0, not"),
        ("vae/config.json", {"scaling_factor": 0.13}, "vae: scaling_factor is 0.13"),
        ("vae/config.json", {"latents_mean": [1.0]}, "vae: latents_mean is [1.0]"),
        ("text_encoder/config.json", {"num_attention_heads": 4}, "text_encoder: num_attention_heads is 4"),
        ("text_encoder/config.json", {"rope_theta": 1.5}, "rope_theta is 1.5, but jaxdiff does not know this key"),
        ("text_encoder/config.json", {"pruned_heads": {"0": [0]}}, "pruned_heads {'0': [0]} asks for another network"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "the text encoder of Stable Diffusion 2.x"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "scheduler: beta_end is 0.02"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "_class_name is 'StableDiffusionXLPipeline'",
        ),
        (
            "model_index.json",
            {"controlnet": ["diffusers", "X"]},
            "controlnet is ['diffusers', 'X'], but jaxdiff does not",
        ),
    ],
)
def test_a_folder_that_a_single_file_cannot_tell_is_refused(tmp_path, first, file, changes, sentence):
    shutil.copytree(first / "in", tmp_path / "in")
    change_json(tmp_path / "in" / file, changes)
    refused(convert(tmp_path / "in", tmp_path / "a.safetensors"), str(tmp_path / "in"), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_with_a_part_missing_is_refused(tmp_path, first):
    for part in ("vae/config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"):
        shutil.copytree(first / "in", tmp_path / "in")
        (tmp_path / "in" / part).unlink()
        refused(convert(tmp_path / "in", tmp_path / "a.safetensors"), str(tmp_path / "in" / part.split("/")[0]))
        shutil.rmtree(tmp_path / "in")
    shutil.copytree(first / "in", tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "tokenizer")
    refused(convert(tmp_path / "in", tmp_path / "out"), "in/tokenizer: has no tokenizer; it should hold vocab.json")
    converted(tmp_path / "in", tmp_path / "a.safetensors")


def test_out_that_holds_something_else_is_left_alone(tmp_path, first):
    for out in (tmp_path / "out", tmp_path / "b.safetensors"):
        shutil.copy(first / "a.safetensors", tmp_path / "a.safetensors")
        if out.suffix:
            save_file({"mine": torch.ones(1)}, out)
        else:
            out.mkdir()
            (out / "mine.txt").write_text("mine")
        refused(convert(first / "in", out), f"OUT {out}: is there, and not of an earlier conversion")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert load_file(tmp_path / "b.safetensors").keys() == {"mine"}
    refused(convert(first / "in", first / "in" / "a.safetensors"), "is SOURCE, inside it or around it")
    refused(convert(first / "a.safetensors", first / "a.safetensors"), "is SOURCE, inside it or around it")
    refused(convert(first / "in", tmp_path / "b.ckpt"), "pickles are not written; end it in .safetensors")


def test_flags_without_effect_and_wrong_sources_are_refused(tmp_path, first):
    folder, single, out = first / "in", first / "a.safetensors", tmp_path / "out"
    refused(convert(folder, out, "--ema"), "--ema has no effect on")
    refused(convert(folder, out, "--prediction-type", "v"), "--prediction-type has no effect on")
    refused(convert(folder, out, "--tokenizer", "x"), "--tokenizer has no effect on")
    refused(convert(single, tmp_path / "b.safetensors", "--tokenizer", "x"), "--tokenizer has no effect on")
    refused(convert(single, out, "--revision", "x"), "--revision x has no effect on")
    refused(convert(single, out, "--ema", "--tokenizer", first / "vocabulary"), "holds no averaged weights")
    (tmp_path / "a.bin").write_bytes(b"x")
    refused(convert(tmp_path / "a.bin", out), "neither a folder nor a file that ends in .safetensors, .ckpt")
    refused(convert(tmp_path / "none.ckpt", out), "no such file or folder")
    assert not out.exists()


def test_a_tokenizer_that_is_not_there_is_refused_before_anything_is_written(tmp_path, first, monkeypatch):
    single, out = first / "a.safetensors", tmp_path / "out"
    monkeypatch.setattr("jaxdiff.io.hub.is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(
        convert(single, out), "--tokenizer openai/clip-vit-large-patch14: ", "the Hugging Face hub cannot be reached"
    )
    refused(convert(single, out, "--tokenizer", first / "vae"), "--tokenizer", "no such folder")
    refused(convert(single, out, "--tokenizer", tmp_path), f"--tokenizer {tmp_path}: has no tokenizer; it should hold")
    words = json.loads((first / "vocabulary" / "vocab.json").read_text())
    shutil.copytree(first / "vocabulary", tmp_path / "larger")
    (tmp_path / "larger" / "vocab.json").write_text(json.dumps({**words, "more": len(words)}))
    refused(
        convert(single, out, "--tokenizer", tmp_path / "larger"), f"has token {len(words)}, but the model only knows"
    )
    assert not out.exists()
    # The folder of a pipeline has it in a sub-folder.
    converted(single, out, "--tokenizer", first / "in")


def test_keys_that_any_config_of_transformers_has_are_no_hindrance(tmp_path, first):
    shutil.copytree(first / "in", tmp_path / "in")
    more = {"pruned_heads": {}, "is_decoder": False, "top_k": 50, "return_dict": True, "id2label": {"0": "LABEL_0"}}
    change_json(
        tmp_path / "in" / "text_encoder" / "config.json", {**more, "dropout": 0.0, "chunk_size_feed_forward": 0}
    )
    converted(tmp_path / "in", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (first / "a.safetensors").read_bytes()


def test_added_words_are_refused_unless_a_folder_is_written(tmp_path, first):
    words = {"<cat-toy>": len(vocabulary()), "<dog-toy>": len(vocabulary()) + 1}
    pipeline = make_standard_pipeline(tmp_path, text_encoder={"vocab_size": len(vocabulary()) + 2})
    pipeline.tokenizer.add_tokens(list(words))
    pipeline.save_pretrained(tmp_path / "in")
    sentence = (
        "tokenizer: has added words: <cat-toy>, <dog-toy>, which programs that read single files do not know: save"
    )
    refused(convert(tmp_path / "in", tmp_path / "a.safetensors"), sentence)
    converted(tmp_path / "in", tmp_path / "out")
    assert CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")("<dog-toy>").input_ids[1] == words["<dog-toy>"]
    # As transformers before 5 wrote them.
    shutil.copytree(first / "vocabulary", tmp_path / "in" / "tokenizer", dirs_exist_ok=True)
    (tmp_path / "in" / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "in" / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
    refused(convert(tmp_path / "in", tmp_path / "a.safetensors"), sentence)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_token_table_that_is_too_long_for_a_single_file(tmp_path):
    make_standard_pipeline(tmp_path, text_encoder={"vocab_size": 49410}).save_pretrained(tmp_path / "in")
    refused(
        convert(tmp_path / "in", tmp_path / "a.safetensors"),
        "text_encoder: its token table has 49410 rows, but programs that read single files know 49408 tokens: save the",
    )
    converted(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, first, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    refused(convert(first / "in", tmp_path / "a.safetensors"), "but only 1,000 are free in")


# --- memory

MEASURE = """
import sys
from pathlib import Path
from weights_convert.stable_diffusion import run
for job in sys.argv[1:]:
    source, out, tokenizer = job.split("|")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    run(source, Path(out), tokenizer=tokenizer or None)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print("peak", int(lines["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_far_from_twice_the_weights(tmp_path, first):
    unet = UNetLayout(4, 4, (128, 256, 448), 1, (False, True, True), 64, linear=False)
    rows = [*unet_rows(unet), *vae_rows(VAELayout(3, 3, (32, 64), 2, 4))]
    rows += text_rows(TextLayout(len(vocabulary()), 77, 64, 96, 2, open_clip=False))
    zeros = {row.single: np.zeros(row.single_shape, np.float32) for row in rows}
    write_safetensors(tmp_path / "a.safetensors", zeros)
    weights = (tmp_path / "a.safetensors").stat().st_size
    assert 150e6 < weights < 250e6

    torch.save({"state_dict": load_file(tmp_path / "a.safetensors")}, tmp_path / "b.ckpt")
    converted(tmp_path / "a.safetensors", tmp_path / "in", "--tokenizer", first / "vocabulary")
    shutil.copytree(tmp_path / "in", tmp_path / "flax", copy_function=os.link)
    change_weights(tmp_path / "flax", as_flax)
    jobs = [
        (first / "in", "bare.safetensors", ""),
        (tmp_path / "b.ckpt", "b.safetensors", ""),
        (tmp_path / "a.safetensors", "out", first / "vocabulary"),
        (tmp_path / "in", "c.safetensors", ""),
        (tmp_path / "flax", "d.safetensors", ""),
    ]
    words = [f"{source}|{tmp_path / out}|{tokenizer}" for source, out, tokenizer in jobs]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True)
    # What Python and its packages take is not the weights'.
    bare, *peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    checkpoint, *others = [(peak - bare) / weights for peak in peaks]
    # Pages of a mapped file count as taken, though the system takes them back as it likes; a checkpoint is not mapped.
    assert checkpoint < 0.4
    assert max(others) < 1.3, others
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
