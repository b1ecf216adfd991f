"""Conversion of pixel-space UNets: diffusers' and the course's own forward pass, and everything that is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from commands import run_here
from conftest import FLOAT32_ATOL
from conversion import SIZE, change_json, convert, make_twin, play_hub, randomize, refused, write_bin_shards
from course_unet import CourseUNet
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file

from jaxdiff.models.unet import PRETRAINED, UNetConfig
from jaxdiff.recipes.pretrained_unet import ForwardProcess, SamplingDefaults, load_pretrained_unet, unet_shapes
from weights_convert import __main__

WEIGHTS = "diffusion_pytorch_model.safetensors"
MANIFEST = Path(__file__).parent / "course_unet_manifest.txt"


def assert_same_prediction(folder: Path, predict, size: int = SIZE, count: int = 2, atol: float = 3 * FLOAT32_ATOL):
    """Compare a converted network with a torch function of channels-first images and timesteps."""
    x_t = np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)
    t = np.array([3, 800])[:count]
    model, params, _ = load_pretrained_unet(folder)
    args = {"params": params}, jnp.asarray(x_t), jnp.asarray(t)
    # Optimising a tiny network takes longer than all the rest.
    options = {"xla_backend_optimization_level": "0"} if size == SIZE else {}
    ours = jax.jit(model.apply).lower(*args).compile(options)(*args)
    with torch.no_grad():
        theirs = predict(torch.from_numpy(x_t.transpose(0, 3, 1, 2)), torch.from_numpy(t)).numpy()
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def twin():
    return make_twin()


@pytest.fixture(scope="module")
def pipeline(twin, tmp_path_factory):
    """A pipeline folder of diffusers, which no test may change."""
    folder = tmp_path_factory.mktemp("pipeline")
    twin.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def converted(pipeline, tmp_path_factory):
    """The pipeline folder's conversion, which no test may change."""
    out = tmp_path_factory.mktemp("converted")
    answer = convert(pipeline, out)
    assert (answer.code, answer.written) == (0, [out / "config.json", out / "model.safetensors"])
    return out


def test_same_prediction_as_diffusers(converted, twin):
    assert_same_prediction(converted, lambda x, t: twin(x, t).sample)


def test_the_config_says_all(converted, pipeline):
    sha256 = hashlib.sha256((pipeline / "unet" / WEIGHTS).read_bytes()).hexdigest()
    unet = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention": [False, True],
        "attention_head_dim": None,
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "dropout": 0.0,
        "flip_sin_to_cos": False,
        "freq_shift": 1.0,
        "downsample_padding": 0,
        "patch_size": 1,
        "scale_shift": False,
        "num_classes": 0,
        "num_domains": 0,
    }
    assert json.loads((converted / "config.json").read_text()) == {
        "format": "jaxdiff-unet",
        "format_version": 1,
        "unet": unet,
        "image_size": SIZE,
        "diffusion": {
            "schedule": "linear",
            "num_train_timesteps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction_type": "eps",
            "zero_terminal_snr": False,
        },
        "sampling": {"spacing": "leading", "steps_offset": 0, "final": -1, "clip": True},
        "source": {"name": str(pipeline), "sha256": sha256},
    }


def old_attention(tensors, as_convolution: bool):
    """Rename attention as diffusers before 0.15 did."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_word, old_word in old.items():
            if f".{new_word}." in name:
                name = name.replace(new_word, old_word)
                tensor = tensor[:, :, None, None] if as_convolution and tensor.ndim == 2 else tensor
        renamed[name] = tensor
    return renamed


def as_bin(model):
    torch.save(load_file(model / WEIGHTS), model / "diffusion_pytorch_model.bin")
    (model / WEIGHTS).unlink()


def as_shards(model):
    shutil.rmtree(model)
    make_twin().save_pretrained(model, max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1


def as_old_names(model):
    save_file(old_attention(load_file(model / WEIGHTS), as_convolution=False), model / WEIGHTS)


def as_old_convolutions(model):
    save_file(old_attention(load_file(model / WEIGHTS), as_convolution=True), model / WEIGHTS)


def as_float16(model):
    save_file({name: tensor.half() for name, tensor in load_file(model / WEIGHTS).items()}, model / WEIGHTS)


@pytest.mark.parametrize("change", [as_bin, as_shards, as_old_names, as_old_convolutions, as_float16])
def test_every_way_of_storing_gives_the_same_parameters(tmp_path, pipeline, converted, change):
    shutil.copytree(pipeline, tmp_path / "in")
    change(tmp_path / "in" / "unet")
    assert convert(tmp_path / "in", tmp_path / "out").code == 0
    found, expected = (load_pretrained_unet(folder)[1] for folder in (tmp_path / "out", converted))
    # float16 has 11 bits, and a spacing of 6e-8 near 0.
    tolerances = {"rtol": 2**-11, "atol": 6e-8} if change is as_float16 else {"rtol": 0, "atol": 0}
    chex.assert_trees_all_close(found, expected, **tolerances)


def test_a_flat_folder_and_a_folder_of_the_model_alone(tmp_path, pipeline, converted):
    shutil.copytree(pipeline / "unet", tmp_path / "model")
    alone = convert(tmp_path / "model", tmp_path / "a")
    assert alone.code == 0
    assert "no scheduler_config.json, so schedule and sampling are set as in DDPM" in alone.out
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    DDIMScheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False).save_pretrained(tmp_path / "model")
    # Over the earlier conversion, which is replaced.
    assert convert(tmp_path / "model", tmp_path / "a").code == 0
    assert load_pretrained_unet(tmp_path / "a")[2].sampling == SamplingDefaults("leading", 1, 0, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, "attention_head_dim": 8},
        {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "in_channels": 3},
    ],
)
def test_other_layouts(tmp_path, changes):
    other = make_twin(**changes)
    other.save_pretrained(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out").code == 0
    assert_same_prediction(tmp_path / "out", lambda x, t: other(x, t).sample)


def without_one(tensors):
    del tensors["mid_block.resnets.0.conv1.bias"]
    return "not the parameters of this model (missing: mid_block.resnets_0.conv1.bias)"


def with_one_more(tensors):
    tensors["class_embedding.weight"] = torch.zeros(3, 3)
    return "(no rule for: class_embedding.weight)"


def deeper(tensors):
    tensors["down_blocks.7.resnets.0.conv1.bias"] = torch.zeros(16)
    return "(not expected: down_blocks_7.resnets_0.conv1.bias)"


def another_shape(tensors):
    tensors["conv_out.bias"] = torch.zeros(6)
    return "conv_out.bias is float32[6] instead of float32[3]"


def another_rank(tensors):
    tensors["conv_out.weight"] = torch.zeros(3, 16)
    return "conv_out.weight has shape (3, 16)"


def integers(tensors):
    tensors["conv_out.bias"] = torch.zeros(3, dtype=torch.int32)
    return "conv_out.bias is int32[3] instead of float32[3]"


def both_names(tensors):
    tensors["mid_block.attentions.0.query.weight"] = tensors["mid_block.attentions.0.to_q.weight"].clone()
    return "filled twice: mid_block.attentions_0.to_q.kernel (again by mid_block.attentions.0."


def not_a_number(tensors):
    tensors["conv_out.bias"][1] = torch.nan
    return "conv_out.bias holds NaN or infinity"


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is True; jaxdiff only has False"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; jaxdiff only has 'silu'"),
        ("unet/config.json", {"sample_size": 15}, "image_size is 15, not a multiple of 2"),
        ("unet/config.json", {"out_channels": 6}, "the UNet makes 6 channels of 3, not a prediction alone"),
        ("scheduler/scheduler_config.json", {"steps_offset": 1000}, "steps_offset is 1000, not a timestep"),
        ("unet/config.json", {"layers_per_block": 2}, "not the parameters of this model (missing: "),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, pipeline, file, changes, sentence):
    shutil.copytree(pipeline, tmp_path / "in")
    change_json(tmp_path / "in" / file, changes)
    refused(convert(tmp_path / "in", tmp_path / "out"), sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil",
    [without_one, with_one_more, deeper, another_shape, another_rank, integers, both_names, not_a_number],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, pipeline, spoil):
    shutil.copytree(pipeline, tmp_path / "in")
    tensors = load_file(pipeline / "unet" / WEIGHTS)
    sentence = spoil(tensors)
    save_file(tensors, tmp_path / "in" / "unet" / WEIGHTS)
    refused(convert(tmp_path / "in", tmp_path / "out"), f"unet/{WEIGHTS}: ", sentence)
    assert not (tmp_path / "out").exists()


# --- the course's file


def test_the_course_twin_is_the_manifest():
    with torch.device("meta"):
        tensors = CourseUNet().state_dict()
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
    assert shapes == dict(line.split("\t") for line in MANIFEST.read_text().splitlines())


def test_parameter_counts():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(unet_shapes(UNetConfig(**PRETRAINED[name]))))
        for name in ("course-face", "ddpm-cifar10-32")
    }
    # The course's own count, and the 35.7 million of arXiv 2006.11239, appendix B.
    assert counts["course-face"] == 113_673_219
    assert round(counts["ddpm-cifar10-32"] / 1e6, 1) == 35.7
    # Nor does the padding change it: 114 million there.
    assert PRETRAINED["ddpm-celebahq-256"] == PRETRAINED["ddpm-church-256"] == PRETRAINED["ddpm-bedroom-256"]
    assert PRETRAINED["ddpm-celebahq-256"]["block_out_channels"] == PRETRAINED["course-face"]["block_out_channels"]


TINY_COURSE = {
    **PRETRAINED["course-face"],
    "block_out_channels": (8, 16),
    "attention": (True, False),
    "norm_num_groups": 4,
}


def save_course(path):
    torch.manual_seed(0)
    twin = randomize(CourseUNet((8, 16), groups=4))
    torch.save(twin.state_dict(), path)
    return twin


def test_same_prediction_as_the_course_network(tmp_path, monkeypatch):
    monkeypatch.setitem(PRETRAINED, "course-face", TINY_COURSE)
    twin = save_course(tmp_path / "UNet.pt")
    answer = convert(tmp_path / "UNet.pt", tmp_path / "out")
    assert answer.code == 0
    _, _, config = load_pretrained_unet(tmp_path / "out")
    assert (config.image_size, config.diffusion) == (256, ForwardProcess())
    assert config.sampling == SamplingDefaults("leading", 1, 0, False)
    assert_same_prediction(tmp_path / "out", twin)


def test_another_course_file_is_refused(tmp_path, monkeypatch):
    save_course(tmp_path / "UNet.pt")
    refused(convert(tmp_path / "UNet.pt", tmp_path / "out"), "UNet.pt: not the weights of this model (no rule for: ")
    monkeypatch.setitem(PRETRAINED, "course-face", TINY_COURSE)
    state = torch.load(tmp_path / "UNet.pt")
    state["time.0.inv_freq"] *= 1.01
    torch.save(state, tmp_path / "UNet.pt")
    refused(convert(tmp_path / "UNet.pt", tmp_path / "out"), "time.0.inv_freq is not 10000^(-2j/8)")
    torch.save({"state_dict": state}, tmp_path / "UNet.pt")
    refused(convert(tmp_path / "UNet.pt", tmp_path / "out"), "holds 'state_dict', which is no tensor")
    torch.save(make_twin().state_dict(), tmp_path / "UNet.pt")
    refused(convert(tmp_path / "UNet.pt", tmp_path / "out"), "weights of diffusers, which need the config.json beside")
    torch.save(CourseUNet((8, 16), groups=4), tmp_path / "UNet.pt")
    refused(convert(tmp_path / "UNet.pt", tmp_path / "out"), "asks to import course_unet.CourseUNet")


@pytest.mark.slow
def test_same_prediction_at_full_size(tmp_path):
    # With torch's own initial values, which keep features of order 1 through a deep network.
    torch.manual_seed(0)
    twin = CourseUNet().eval()
    torch.save(twin.state_dict(), tmp_path / "UNet.pt")
    assert convert(tmp_path / "UNet.pt", tmp_path / "course").code == 0
    assert_same_prediction(tmp_path / "course", twin, size=256, count=1, atol=1e-4)
    layout = PRETRAINED["ddpm-celebahq-256"]
    kinds = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in layout["attention"]]
    theirs = make_twin(
        sample_size=256,
        block_out_channels=layout["block_out_channels"],
        layers_per_block=2,
        down_block_types=kinds,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        norm_num_groups=32,
        spread=0.0,
    )
    theirs.save_pretrained(tmp_path / "celeba")
    assert convert(tmp_path / "celeba", tmp_path / "out").code == 0
    assert load_pretrained_unet(tmp_path / "out")[0].config == UNetConfig(**layout)
    assert_same_prediction(tmp_path / "out", lambda x, t: theirs(x, t).sample, size=256, count=1, atol=1e-4)


# --- sources and outputs


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere", "nowhere: no such file or folder, nor owner/name of a model on the hub"),
        ("/no/where/at/all", "/no/where/at/all: no such file or folder"),
        ("../../x", "no such file or folder"),
    ],
)
def test_a_source_that_is_nowhere(tmp_path, source, sentence):
    refused(convert(source, tmp_path / "out"), sentence)


def test_a_hub_that_does_not_answer_is_one_sentence_with_the_way_around(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdiff.io.hub.is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    answer = convert("google/ddpm-celebahq-256", tmp_path / "out")
    refused(answer, "the Hugging Face hub cannot be reached", "`hf download google/ddpm-celebahq-256 --local-dir DIR`")


def test_a_hub_name_downloads_no_more_than_it_needs(tmp_path, pipeline, monkeypatch):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(pipeline, remote)
    (remote / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "vae/model.bin"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"never wanted")
    monkeypatch.chdir(tmp_path)
    asked = play_hub(monkeypatch, remote, cache)
    assert convert("google/ddpm-tiny", tmp_path / "out", "--revision", "v1").code == 0
    assert set(asked) == {("google/ddpm-tiny", "v1")}
    assert load_pretrained_unet(tmp_path / "out")[2].source.name == "google/ddpm-tiny"
    here = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert here == {"model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"}
    # A model that only has the older format.
    as_bin(remote / "unet")
    shutil.rmtree(cache)
    assert convert("google/ddpm-tiny", tmp_path / "out").code == 0


@pytest.mark.parametrize("change", ["fp16", "alone", "bin in shards"])
def test_a_hub_name_with_other_files(tmp_path, pipeline, monkeypatch, change):
    """Variants, which are all there is, are read and said; a model may lie in a folder of its own, or in shards."""
    remote = tmp_path / "remote"
    shutil.copytree(pipeline if change != "alone" else pipeline / "unet", remote)
    if change != "alone":
        (remote / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    if change == "fp16":
        (remote / "unet" / WEIGHTS).rename(remote / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    if change == "bin in shards":
        write_bin_shards(remote / "unet" / "diffusion_pytorch_model.bin", load_file(remote / "unet" / WEIGHTS))
        (remote / "unet" / WEIGHTS).unlink()
    monkeypatch.chdir(tmp_path)
    play_hub(monkeypatch, remote, tmp_path / "cache")
    answer = convert("google/ddpm-tiny", tmp_path / "out")
    assert answer.code == 0, answer
    assert ("no plain weights found, so diffusion_pytorch_model.fp16.safetensors is read" in answer.out) == (
        change == "fp16"
    )
    assert convert(pipeline, tmp_path / "expected").code == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_hub_name_that_is_no_folder_of_diffusers(tmp_path, monkeypatch):
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "v1-5-pruned.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    play_hub(monkeypatch, tmp_path / "remote", tmp_path / "cache")
    refused(convert("someone/files", tmp_path / "out"), "has neither model_index.json nor config.json", "download that")


def test_a_revision_of_a_local_folder_is_refused(tmp_path, pipeline):
    refused(convert(pipeline, tmp_path / "out", "--revision=v1"), "--revision v1 has no effect on")


def test_a_folder_without_weights_or_config(tmp_path, pipeline):
    shutil.copytree(pipeline, tmp_path / "in")
    (tmp_path / "in" / "unet" / WEIGHTS).unlink()
    refused(
        convert(tmp_path / "in", tmp_path / "out"),
        "unet: holds no weights; looked for diffusion_pytorch_model.safetensors, ",
    )
    (tmp_path / "in" / "unet" / "config.json").unlink()
    refused(convert(tmp_path / "in", tmp_path / "out"), "unet/config.json: cannot be read (No such file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("config.json", '{"format": "other"}'),
        ("config.json", "{"),
        ("model.safetensors", "mine"),
    ],
)
def test_an_output_with_other_content_is_refused_and_stays(tmp_path, pipeline, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    sentence = f"out: holds {name}, which is not of an earlier jaxdiff-unet conversion"
    refused(convert(pipeline, tmp_path / "out"), sentence)
    assert (tmp_path / "out" / name).read_text() == content


def test_an_output_that_cannot_be_written(tmp_path, pipeline):
    (tmp_path / "file").write_text("mine")
    refused(convert(pipeline, tmp_path / "file" / "out"), "OUT ", f"because {tmp_path / 'file'} is not a folder")
    refused(convert(pipeline, tmp_path / "file"), "OUT ", f"because {tmp_path / 'file'} is not a folder")


def test_words_that_are_missing_or_unknown(monkeypatch):
    for words in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["weights_convert", *words])
        answer = run_here(lambda _: __main__.main())
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.startswith("usage: python -m weights_convert COMMAND SOURCE OUT\n")
    monkeypatch.setattr(sys, "argv", ["weights_convert", "vae"])
    assert run_here(lambda _: __main__.main()).err.startswith("python -m weights_convert: error: no command 'vae'\n")
    assert convert().code == 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy, atexit; sys.argv = ['x', 'ddpm', '--help'];"
        "atexit.register(lambda: print([m for m in ('jax', 'numpy', 'torch', 'huggingface_hub') if m in sys.modules]));"
        "runpy.run_module('weights_convert', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m weights_convert ddpm [-h] SOURCE OUT")
    assert done.stdout.endswith("[]\n")
