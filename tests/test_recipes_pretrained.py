"""Published CLIP models, as an old script of transformers 4 uses them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from clip_twins import IDS, MASK, draw_pixels, make_pair, make_twin
from conversion import write_bin_shards
from flax.serialization import msgpack_restore, msgpack_serialize
from safetensors.numpy import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from jaxdiff import (
    CLIPConfig,
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPVisionModel,
    FlaxCLIPVisionModelWithProjection,
)
from jaxdiff.errors import InputError
from jaxdiff.io import hub
from jaxdiff.io.weight_files import forget_weights, weight_files
from jaxdiff.io.weights import flatten_params

pytestmark = pytest.mark.usefixtures("quick_commands")

ATOL = 1e-4
"""End to end: similarities are cosines times about 15."""

LAYER = [
    f"{part}/{leaf}"
    for part, leaves in {
        "layer_norm1": ("bias", "scale"),
        "layer_norm2": ("bias", "scale"),
        "mlp/fc1": ("bias", "kernel"),
        "mlp/fc2": ("bias", "kernel"),
        "self_attn/k_proj": ("bias", "kernel"),
        "self_attn/out_proj": ("bias", "kernel"),
        "self_attn/q_proj": ("bias", "kernel"),
        "self_attn/v_proj": ("bias", "kernel"),
    }.items()
    for leaf in leaves
]
WRITTEN_BY_4_57 = sorted(
    [
        "logit_scale",
        "text_model/embeddings/position_embedding/embedding",
        "text_model/embeddings/token_embedding/embedding",
        "text_model/final_layer_norm/bias",
        "text_model/final_layer_norm/scale",
        "text_projection/kernel",
        "vision_model/embeddings/class_embedding",
        "vision_model/embeddings/patch_embedding/kernel",
        "vision_model/embeddings/position_embedding/embedding",
        "vision_model/post_layernorm/bias",
        "vision_model/post_layernorm/scale",
        "vision_model/pre_layrnorm/bias",
        "vision_model/pre_layrnorm/scale",
        "visual_projection/kernel",
        *(
            f"{tower}/encoder/layers/{n}/{leaf}"
            for tower in ("text_model", "vision_model")
            for n in (0, 1)
            for leaf in LAYER
        ),
    ]
)
"""Keys of the flax_model.msgpack that transformers 4.57.6's FlaxCLIPModel wrote, two layers a tower."""
SHAPES_BY_4_57 = {
    "logit_scale": (),
    "text_projection/kernel": (32, 20),
    "visual_projection/kernel": (24, 20),
    "vision_model/embeddings/patch_embedding/kernel": (5, 5, 3, 24),
    "vision_model/embeddings/position_embedding/embedding": (17, 24),
    "text_model/encoder/layers/1/mlp/fc1/kernel": (32, 48),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers 5 writes it, and its torch model."""
    folder = tmp_path_factory.mktemp("published")
    twin = make_twin()
    twin.save_pretrained(folder)
    return folder, twin


@pytest.fixture(scope="module")
def model(published):
    return FlaxCLIPModel.from_pretrained(published[0])


@pytest.fixture(scope="module")
def answer(published):
    with torch.no_grad():
        return published[1](torch.from_numpy(IDS), torch.from_numpy(draw_pixels(2)), torch.from_numpy(MASK))


def similarities(model, params=None):
    return model(IDS, draw_pixels(2), MASK, params=params).logits_per_image


def test_an_old_script_runs(published, answer):
    model, params = FlaxCLIPModel.from_pretrained(str(published[0]), dtype=jnp.float32, _do_init=False)
    inputs = {"input_ids": IDS, "pixel_values": draw_pixels(2), "attention_mask": MASK}
    outputs = model(**inputs, params=params, train=False)
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits_per_image, axis=1).sum(axis=1), 1, rtol=1e-6)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(outputs[name], getattr(answer, name).numpy(), atol=ATOL)
    assert list(outputs) == [
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
    ]
    np.testing.assert_array_equal(outputs[0], outputs.logits_per_image)
    np.testing.assert_array_equal(outputs.text_model_output[1], outputs.text_model_output.pooler_output)
    assert model.config.projection_dim == 20
    assert model.config.vision_config.image_size == 20
    assert "hidden_states" not in outputs.vision_model_output

    @jax.jit
    def features(pixel_values, params):
        embeds = model.get_image_features(pixel_values, params=params)
        return embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)

    np.testing.assert_allclose(features(draw_pixels(2), params), answer.image_embeds.numpy(), atol=ATOL)
    with pytest.raises(ValueError, match="give each call params="):
        model.get_text_features(IDS, MASK)
    with_own = FlaxCLIPModel.from_pretrained(published[0])
    texts = with_own.get_text_features(input_ids=IDS, attention_mask=MASK)
    texts /= jnp.linalg.norm(texts, axis=-1, keepdims=True)
    np.testing.assert_allclose(texts, answer.text_embeds.numpy(), atol=ATOL)
    assert with_own(**inputs, return_dict=False)[0].shape == (2, 3)
    states = with_own(**inputs, output_hidden_states=True).text_model_output.hidden_states
    assert len(states) == 3


def test_the_parameter_tree_is_that_of_transformers_4(model):
    flat = {name.replace(".", "/"): leaf for name, leaf in flatten_params(model.params).items()}
    assert sorted(flat) == WRITTEN_BY_4_57
    assert {name: flat[name].shape for name in SHAPES_BY_4_57} == SHAPES_BY_4_57


def test_flax_files_load_unchanged(tmp_path, published, answer):
    _, _, params = make_pair()
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(params))
    shutil.copy(published[0] / "config.json", tmp_path)
    np.testing.assert_allclose(
        similarities(FlaxCLIPModel.from_pretrained(tmp_path)), answer.logits_per_image.numpy(), atol=ATOL
    )
    # As does the safetensors file that the old classes wrote, in linen's layout.
    (tmp_path / "flax_model.msgpack").unlink()
    flat = {name: np.asarray(leaf) for name, leaf in flatten_params(params).items()}
    save_file(flat, tmp_path / "model.safetensors", {"format": "flax"})
    np.testing.assert_allclose(
        similarities(FlaxCLIPModel.from_pretrained(tmp_path)), answer.logits_per_image.numpy(), atol=ATOL
    )


def test_torch_files_load(tmp_path, published, answer):
    tensors = published[1].state_dict()
    tensors["text_model.embeddings.position_ids"] = torch.arange(11)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(published[0] / "config.json", tmp_path)
    model = FlaxCLIPModel.from_pretrained(tmp_path, from_pt=True)
    np.testing.assert_allclose(similarities(model), answer.logits_per_image.numpy(), atol=ATOL)


def test_shards_load(tmp_path, published, answer):
    published[1].save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = FlaxCLIPModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(similarities(model), answer.logits_per_image.numpy(), atol=ATOL)


@pytest.mark.parametrize("word", ["", ".fp16"])
def test_torch_shards_load(tmp_path, published, answer, word):
    shutil.copy(published[0] / "config.json", tmp_path)
    index = write_bin_shards(tmp_path / "pytorch_model.bin", published[1].state_dict())
    forget_weights()
    index.rename(tmp_path / f"pytorch_model.bin.index{word}.json")
    model = FlaxCLIPModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(similarities(model), answer.logits_per_image.numpy(), atol=ATOL)
    assert {Path(path).name for path in weight_files()} == {path.name for path in tmp_path.glob("pytorch_model*")}


def test_half_precision_files_give_float32_parameters(tmp_path, published, answer):
    make_twin().to(torch.bfloat16).save_pretrained(tmp_path)
    model = FlaxCLIPModel.from_pretrained(tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    # bfloat16 keeps 8 bits of each weight.
    np.testing.assert_allclose(similarities(model), answer.logits_per_image.numpy(), atol=0.3)
    rounded = FlaxCLIPModel.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    np.testing.assert_allclose(similarities(rounded), answer.logits_per_image.numpy(), atol=0.5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.to_bf16(model.params))} == {"bfloat16"}


def test_saved_models_come_back(tmp_path, model, published):
    model.save_pretrained(tmp_path / "flax")
    assert sorted(path.name for path in (tmp_path / "flax").iterdir()) == ["config.json", "flax_model.msgpack"]
    saved = flatten_params(msgpack_restore((tmp_path / "flax" / "flax_model.msgpack").read_bytes()))
    assert sorted(name.replace(".", "/") for name in saved) == WRITTEN_BY_4_57
    again = FlaxCLIPModel.from_pretrained(tmp_path / "flax")
    assert again.config == model.config
    np.testing.assert_array_equal(similarities(again), similarities(model))
    with pytest.raises(InputError, match=r"holds a flax_model.msgpack, which would be read instead"):
        model.save_pretrained(tmp_path / "flax", safe_serialization=True)
    model.save_pretrained(tmp_path / "torch", safe_serialization=True)
    twin = CLIPModel.from_pretrained(tmp_path / "torch")
    wanted = published[1].state_dict()
    assert twin.state_dict().keys() == wanted.keys()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("own_files", [False, True])
def test_one_transformer_out_of_a_whole_model_or_of_its_own_files(tmp_path, published, own_files):
    folder = published[0]
    cases = [
        (CLIPTextModel, FlaxCLIPTextModel, (IDS, MASK), "pooler_output"),
        (CLIPTextModelWithProjection, FlaxCLIPTextModelWithProjection, (IDS, MASK), "text_embeds"),
        (CLIPVisionModelWithProjection, FlaxCLIPVisionModelWithProjection, (draw_pixels(2),), "image_embeds"),
    ]
    for theirs, ours, inputs, name in cases:
        part = theirs.from_pretrained(folder).eval()
        if own_files:
            part.save_pretrained(tmp_path / theirs.__name__)
        model = ours.from_pretrained(tmp_path, subfolder=theirs.__name__) if own_files else ours.from_pretrained(folder)
        with torch.no_grad():
            wanted = part(*map(torch.from_numpy, inputs))
        outputs = model(*inputs)
        np.testing.assert_allclose(outputs[name], getattr(wanted, name).numpy(), atol=ATOL)
        np.testing.assert_allclose(outputs.last_hidden_state, wanted.last_hidden_state.numpy(), atol=ATOL)
        model.save_pretrained(tmp_path / "again")
        np.testing.assert_array_equal(ours.from_pretrained(tmp_path / "again")(*inputs)[name], outputs[name])
        shutil.rmtree(tmp_path / "again")


def test_a_text_model_of_the_old_torch_layout(tmp_path, published):
    """Stable Diffusion's text encoders carry the prefix that transformers 5 drops."""
    state = published[1].state_dict()
    text = {name: tensor.numpy() for name, tensor in state.items() if name.startswith("text_model.")}
    text["text_model.embeddings.position_ids"] = np.arange(11)[None]
    save_file(text, tmp_path / "model.safetensors", {"format": "pt"})
    config = published[1].config.text_config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = FlaxCLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = published[1].text_model(torch.from_numpy(IDS)).last_hidden_state
    np.testing.assert_allclose(model(IDS)[0], wanted.numpy(), atol=ATOL)


def test_a_fresh_model_has_random_parameters_that_can_be_replaced(model):
    fresh = FlaxCLIPModel(model.config, seed=3)
    before = similarities(fresh)
    assert np.isfinite(before).all()
    fresh.params = model.params
    np.testing.assert_array_equal(similarities(fresh), similarities(model))
    with pytest.raises(InputError, match=r"params: not the parameters of this model \(missing: logit_scale\)"):
        fresh.params = {name: leaf for name, leaf in model.params.items() if name != "logit_scale"}


# --- what cannot be used


def edit(folder, published, change):
    """Copy a published folder with other tensors."""
    shutil.copy(published[0] / "config.json", folder)
    tensors = load_file(published[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("logit_scale"), r"missing: logit_scale"),
        (
            lambda t: t.update({"text_model.extra.weight": np.ones(3, np.float32)}),
            "not expected: text_model.extra.weight",
        ),
        (lambda t: t.update({"logit_scale": np.array(np.nan, np.float32)}), "logit_scale holds NaN or infinity"),
        (lambda t: t.update({"logit_scale": np.array(4)}), r"wrong: logit_scale is int64\[\] instead of float32\[\]"),
        (
            lambda t: t.update({"text_projection.weight": np.ones((32, 20), np.float32)}),
            r"wrong: text_projection.weight is float32\[32, 20\] instead of float32\[20, 32\]",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, published, change, sentence):
    edit(tmp_path, published, change)
    with pytest.raises(InputError, match=sentence):
        FlaxCLIPModel.from_pretrained(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path, published):
    with pytest.raises(InputError, match="no such folder; give the folder of a model, or OWNER/NAME"):
        FlaxCLIPModel.from_pretrained(tmp_path / "nope")
    with pytest.raises(InputError, match=r"has no config.json; it should hold config.json and model.safetensors"):
        FlaxCLIPModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a folder, which has no revision 'main'"):
        FlaxCLIPModel.from_pretrained(tmp_path, revision="main")
    shutil.copy(published[0] / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no weights; looked for flax_model.msgpack, model.safetensors"):
        FlaxCLIPModel.from_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1a")
    with pytest.raises(InputError, match=r"flax_model.msgpack: truncated, or not a msgpack file of flax"):
        FlaxCLIPModel.from_pretrained(tmp_path)


def test_a_hub_that_cannot_be_reached_names_the_way_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(InputError, match="run `hf download openai/clip-vit-base-patch32 --revision 3d74ac --local-dir"):
        FlaxCLIPModel.from_pretrained("openai/clip-vit-base-patch32", revision="3d74ac", cache_dir=tmp_path)


@pytest.mark.parametrize("told", [False, True])
def test_the_cache_of_the_hub_serves_without_a_network(tmp_path, monkeypatch, published, answer, told):
    monkeypatch.setattr(hub, "is_reachable", lambda: told)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", told)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(published[0], snapshot)
    model = FlaxCLIPModel.from_pretrained("owner/name", revision=commit, cache_dir=tmp_path)
    np.testing.assert_allclose(similarities(model), answer.logits_per_image.numpy(), atol=ATOL)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"input_ids": np.zeros((1, 12), np.int32)}, "12 tokens, more than the 11 positions of the model"),
        ({"input_ids": np.array([[97, 99]])}, r"99 is not in 0..98: the tokenizer is another model's"),
        (
            {"pixel_values": np.zeros((2, 20, 20, 3))},
            r"shape \(2, 20, 20, 3\), but .* takes \(images, 3, 20, 20\)",
        ),
        ({"pixel_values": np.zeros((2, 3, 24, 24))}, r"shape \(2, 3, 24, 24\), but"),
        ({"output_attentions": True}, "attention weights are not kept"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, sentence):
    with pytest.raises(InputError, match=sentence):
        model(**{"input_ids": IDS, "pixel_values": draw_pixels(2), **inputs})


def test_config_can_be_made_in_place():
    assert CLIPConfig().to_dict()["text_config"]["hidden_act"] == "quick_gelu"
    with pytest.raises(InputError, match="hidden_act"):
        FlaxCLIPVisionModel.read_config({"model_type": "clip_vision_model", "hidden_act": "silu"})
