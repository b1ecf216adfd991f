"""Folders of pretrained UNets: what is saved is loaded, and everything that is refused."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest
from tiny_model import random_params

from jaxdiff.errors import InputError
from jaxdiff.models.unet import UNet, UNetConfig
from jaxdiff.recipes.pretrained_unet import (
    ForwardProcess,
    PretrainedConfig,
    SamplingDefaults,
    Source,
    load_pretrained_unet,
    save_pretrained_unet,
)

UNET = UNetConfig(block_out_channels=(8, 16), attention=(False, True), attention_head_dim=None, norm_num_groups=4)
CONFIG = PretrainedConfig(
    UNET,
    8,
    ForwardProcess("cosine", 50, prediction_type="v"),
    SamplingDefaults("trailing", 1, 0, False),
    Source("x", "0"),
)


@pytest.fixture(scope="module")
def params():
    return random_params(UNet(UNET).init, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,), jnp.int32))["params"]


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A saved folder, which no test may change."""
    folder = tmp_path_factory.mktemp("saved")
    assert save_pretrained_unet(folder, params, CONFIG) == [folder / "config.json", folder / "model.safetensors"]
    return folder


def test_what_is_saved_is_loaded(saved, params):
    model, loaded, config = load_pretrained_unet(saved)
    assert (model, config) == (UNet(UNET), CONFIG)
    chex.assert_trees_all_equal(loaded, params)
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(format="other"), "format 'other' version 1 instead of 'jaxdiff-unet' version 1"),
        (lambda c: c.update(format_version=2), "format 'jaxdiff-unet' version 2 instead of"),
        (lambda c: c.pop("sampling"), "it lacks sampling"),
        (lambda c: c.update(more=1), "it has unknown more"),
        (lambda c: c["unet"].update(width=1), "it has unknown unet.width"),
        (lambda c: c["unet"].pop("norm_eps"), "it lacks unet.norm_eps"),
        (lambda c: c["unet"].update(norm_eps="small"), "unet.norm_eps is 'small', not float"),
        (lambda c: c["unet"].update(norm_eps=float("nan")), "unet.norm_eps is nan, not float"),
        (lambda c: c["unet"].update(num_classes=3), "a pretrained UNet has no class or domain conditions"),
        (lambda c: c["unet"].update(norm_eps=10**400), "unet.norm_eps is 10+, not float"),
        (lambda c: c["unet"].update(out_channels=6), "the UNet makes 6 channels of 3, not a prediction alone"),
        (lambda c: c["unet"].update(attention_head_dim=-8), "must all number at least 1"),
        (lambda c: c["unet"].update(freq_shift=4), r"freq_shift 4\.0 is too large for 8 channels"),
        (lambda c: c["unet"].update(attention=[True]), "attention needs one entry a level"),
        (lambda c: c.update(unet=[1]), r"unet is \[1\], not an object"),
        (lambda c: c["diffusion"].update(schedule="other"), "diffusion.schedule is 'other', not one of 'linear'"),
        (lambda c: c["sampling"].update(final=1), "sampling.final is 1, not one of -1, 0"),
        (lambda c: c["sampling"].update(final=False), "sampling.final is False, not one of -1, 0"),
        (lambda c: c["unet"].update(block_out_channels=[16, 64]), r"model.safetensors: not the parameters .*wrong: "),
    ],
)
def test_a_config_of_ours_that_is_wrong_is_refused_by_name(tmp_path, saved, change, sentence):
    shutil.copytree(saved, tmp_path / "in")
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=sentence) as caught:
        load_pretrained_unet(tmp_path / "in")
    assert str(caught.value).startswith(str(tmp_path / "in"))


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="no such file; make the folder with `python -m weights_convert ddpm SOURCE"):
        load_pretrained_unet(tmp_path)


def test_a_truncated_file_is_one_sentence(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated"):
        load_pretrained_unet(tmp_path / "in")


def test_bfloat16_is_a_choice_of_the_reader(saved):
    model, params, _ = load_pretrained_unet(saved, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
