import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from clip_twins import IDS, MASK, draw_pixels, make_pair
from conftest import FLOAT32_ATOL
from transformers import CLIPConfig, CLIPModel

from jaxdiff import FlaxCLIPModel
from jaxdiff.errors import InputError
from jaxdiff.models.clip import end_positions
from jaxdiff.models.clip_config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    read_clip_config,
    tower_config,
)

pytestmark = pytest.mark.usefixtures("quick_commands")

# Similarities are cosines times exp(logit_scale), about 15 here.
LOGITS_ATOL = 1e-4


ONE = {"num_hidden_layers": 1}
"""Options are the same in every layer; one case has two."""


def channels_last(pixels):
    return jnp.asarray(pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("text", "vision", "projection_dim"),
    [
        ({}, {}, 20),
        (ONE | {"hidden_act": "gelu"}, ONE | {"hidden_act": "gelu"}, 20),
        (ONE | {"hidden_act": "gelu"}, ONE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}, 7),
        (ONE | {"num_attention_heads": 1, "eos_token_id": 2}, ONE | {"patch_size": 4}, 20),
        # One patch only; pixels beyond the last whole patch are unseen.
        (ONE, ONE | {"image_size": 17, "patch_size": 11}, 20),
    ],
)
def test_same_tensors_same_outputs_as_transformers(text, vision, projection_dim):
    twin, model, params = make_pair(text, vision, projection_dim)
    pixels = draw_pixels(2, model.config.vision_config.image_size)
    logits, text_embeds, image_embeds, encoded_text, encoded_image = jax.jit(model.apply)(
        {"params": params}, IDS, channels_last(pixels), MASK
    )
    with torch.no_grad():
        theirs = twin(
            torch.from_numpy(IDS),
            torch.from_numpy(pixels),
            torch.from_numpy(MASK),
            output_hidden_states=True,
        )
    for ours, wanted in (
        (text_embeds, theirs.text_embeds),
        (image_embeds, theirs.image_embeds),
        (encoded_text.last_hidden_state, theirs.text_model_output.last_hidden_state),
        (encoded_image.last_hidden_state, theirs.vision_model_output.last_hidden_state),
        *zip(encoded_text.hidden_states, theirs.text_model_output.hidden_states, strict=True),
        *zip(encoded_image.hidden_states, theirs.vision_model_output.hidden_states, strict=True),
    ):
        np.testing.assert_allclose(ours, wanted.numpy(), atol=FLOAT32_ATOL, rtol=FLOAT32_ATOL)
    np.testing.assert_allclose(logits, theirs.logits_per_image.numpy(), atol=LOGITS_ATOL)


@pytest.mark.parametrize("mask", [None, MASK, np.tile([[0, 1, 1, 1, 1, 1]], (3, 1)), MASK[:, ::-1]])
def test_masked_tokens_are_seen_by_no_other(mask):
    twin, model, params = make_pair()
    ours, _ = jax.jit(functools.partial(model.apply, method=model.encode_text))({"params": params}, IDS, mask)
    with torch.no_grad():
        masked = None if mask is None else torch.from_numpy(mask.copy())
        theirs = twin.text_model(torch.from_numpy(IDS), masked).last_hidden_state.numpy()
    # A token before which all are masked sees nothing; what it becomes is nobody's business.
    sees = np.ones(IDS.shape, bool) if mask is None else np.cumsum(mask, axis=1) > 0
    np.testing.assert_allclose(ours.last_hidden_state[sees], theirs[sees], atol=FLOAT32_ATOL, rtol=FLOAT32_ATOL)


def test_positions_can_be_given():
    twin, model, params = make_pair()
    positions = np.array([[3, 2, 1, 0, 10, 4]] * 3)
    encode = jax.jit(functools.partial(model.apply, method=model.encode_text))
    ours, _ = encode({"params": params}, IDS, MASK, positions)
    with torch.no_grad():
        theirs = twin.text_model(torch.from_numpy(IDS), torch.from_numpy(MASK), torch.from_numpy(positions))
    np.testing.assert_allclose(ours.pooler_output, theirs.pooler_output.numpy(), atol=FLOAT32_ATOL, rtol=FLOAT32_ATOL)


BOS, EOS, NEW = 49406, 49407, 49409


@pytest.mark.parametrize(
    ("ids", "eos_token_id", "position"),
    [
        ([BOS, 5, EOS, EOS, EOS], EOS, 2),
        ([BOS, 5, EOS, EOS, EOS], 2, 2),
        # A token that textual inversion added stands before the end of the text.
        ([BOS, NEW, 7, EOS, EOS], EOS, 3),
        ([BOS, NEW, 7, EOS, EOS], 2, 3),
        # Padding with another token than the end of the text, as OpenCLIP does.
        ([BOS, 5, 6, EOS, 0], EOS, 3),
        ([BOS, 5, 6, EOS, 0], 2, 3),
        # Another vocabulary with the old id: the largest id ends the text.
        ([97, 2, 5, 98, 1], 2, 3),
        ([97, 5, 6, 7, 8], 98, 0),
    ],
)
def test_the_end_of_the_text_is_found_by_its_id(ids, eos_token_id, position):
    assert end_positions(jnp.array([ids]), eos_token_id).tolist() == [position]


def test_bfloat16_stays_near_float32():
    _, model, params = make_pair()
    pixels = channels_last(draw_pixels(2))
    exact = jax.jit(model.apply)({"params": params}, IDS, pixels, MASK)
    rounded = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({"params": params}, IDS, pixels, MASK)
    assert rounded[3].last_hidden_state.dtype == jnp.bfloat16
    assert rounded[0].dtype == jnp.float32
    # bfloat16 keeps 8 bits; two layers of a few operations each.
    np.testing.assert_allclose(rounded[1], exact[1], atol=0.03)
    np.testing.assert_allclose(rounded[2], exact[2], atol=0.03)


def test_every_input_counts_alone():
    _, model, params = make_pair()
    pixels = channels_last(draw_pixels(3))
    apply = jax.jit(model.apply)
    together = apply({"params": params}, IDS, pixels, MASK)
    for i in range(3):
        alone = apply({"params": params}, IDS[i : i + 1], pixels[i : i + 1], MASK[i : i + 1])
        for whole, part in zip(together[1:3], alone[1:3]):
            np.testing.assert_allclose(whole[i], part[0], atol=FLOAT32_ATOL)


def test_config_of_old_files():
    """The first files held each config twice, as `text_config` and as `text_config_dict`, which counts."""
    values = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 512, "hidden_act": "gelu"},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "projection_dim": 512},
        "vision_config": {"patch_size": 14},
        "vision_config_dict": None,
    }
    config = read_clip_config(values)
    assert config.text_config == CLIPTextConfig(hidden_size=768, num_attention_heads=12, projection_dim=768)
    assert config.vision_config == CLIPVisionConfig(patch_size=14, projection_dim=768)
    assert tower_config(values, CLIPTextConfig) == config.text_config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "siglip"}, "config.json: model_type is 'siglip', not 'clip'"),
        ({"text_config": {"hidden_act": "relu"}}, "config.json: hidden_act 'relu' is not known: it must be quick_gelu"),
        ({"vision_config": {"hidden_act": "gelu_new"}}, "hidden_act 'gelu_new' is not known"),
        ({"vision_config": {"image_size": [224, 336]}}, r"image_size must be one whole number, got \[224, 336\]"),
        ({"vision_config": {"patch_size": 0}}, "patch_size must be at least 1, got 0"),
        ({"vision_config": {"patch_size": 225}}, "patch_size 225 is more than image_size 224"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden_size 512 does not split into num_attention_heads 7"),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id must be one whole number, got \[1, 2\]"),
        ({"text_config": {"add_cross_attention": True}}, "add_cross_attention True asks for another network"),
        ({"text_config": {"pruned_heads": {"0": [1]}}}, r"pruned_heads {'0': \[1\]} asks for another network"),
        ({"vision_config": {"is_decoder": True}}, "is_decoder True asks for another network"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True asks for another network"),
        (
            {"text_config": {"rope_theta": 1e4}},
            "config.json: rope_theta is 10000.0, but jaxdiff does not know this key",
        ),
        ({"vision_config": {"use_class_token": False}}, "use_class_token is False, but jaxdiff does not know"),
        ({"text_config": {"image_size": 224}}, "image_size is 224, but jaxdiff does not know"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is {'bits': 4}, but jaxdiff does not know"),
        ({"projection_dim": "wide"}, "projection_dim must be one whole number, got 'wide'"),
    ],
)
def test_a_config_of_another_network_is_refused_by_name(values, sentence):
    with pytest.raises(InputError, match=sentence):
        read_clip_config(values)


# --- published config.json files: their keys, and the values that decide

OF_ANY_MODEL_BEFORE_5 = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "dropout": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "layer_norm_eps": 1e-05,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_hidden_layers": 12,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}
"""Of each transformer of openai/clip-vit-base-patch32 and openai/clip-vit-large-patch14."""
SINCE_4_24 = {
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "tf_legacy_loss": False,
    "typical_p": 1.0,
}
"""More of those of laion's models."""
TEXT_OF_OPENAI = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408}
TEXT_OF_OPENAI |= {"max_position_embeddings": 77, "model_type": "clip_text_model", "hidden_act": "quick_gelu"}
VISION_OF_OPENAI = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "image_size": 224}
VISION_OF_OPENAI |= {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
OF_STABLE_DIFFUSION = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "torch_dtype": "float32",
    "transformers_version": "4.23.0.dev0",
    **TEXT_OF_OPENAI,
}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "projection_dim")


def sizes(*numbers):
    return dict(zip(SIZES, numbers))


def test_published_configs_of_whole_models_are_read():
    text, vision = {**OF_ANY_MODEL_BEFORE_5, **TEXT_OF_OPENAI}, {**OF_ANY_MODEL_BEFORE_5, **VISION_OF_OPENAI}
    whole = {"_name_or_path": "x", "architectures": ["CLIPModel"], "initializer_factor": 1.0, "model_type": "clip"}
    whole |= {"logit_scale_init_value": 2.6592, "torch_dtype": "float32", "transformers_version": None}
    base = {
        **whole,
        "projection_dim": 512,
        "text_config": {**text, **sizes(512, 2048, 8, 12, 512)},
        "text_config_dict": None,
        "vision_config": {**vision, **sizes(768, 3072, 12, 12, 512), "patch_size": 32},
        "vision_config_dict": None,
    }
    config = read_clip_config(base)
    assert config.text_config == CLIPTextConfig(bos_token_id=0, eos_token_id=2)
    assert config.vision_config == CLIPVisionConfig()
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = read_clip_config(
        {
            **whole,
            "projection_dim": 768,
            "text_config": {**text, **sizes(768, 3072, 12, 12, 768)},
            "text_config_dict": sizes(768, 3072, 12, 12, 768),
            "vision_config": {**vision, **large, "patch_size": 14, "projection_dim": 768},
            "vision_config_dict": {**large, "patch_size": 14, "projection_dim": 768},
        }
    )
    assert (config.text_config.hidden_size, config.vision_config.patch_size) == (768, 14)
    huge = {"hidden_act": "gelu", **sizes(1280, 5120, 16, 32, 1024), "patch_size": 14}
    config = read_clip_config(
        {
            **whole,
            "_commit_hash": None,
            "projection_dim": 1024,
            "text_config": {**text, **SINCE_4_24, "hidden_act": "gelu", **sizes(1024, 4096, 16, 24, 512)},
            "text_config_dict": {"hidden_act": "gelu", **sizes(1024, 4096, 16, 24)},
            "vision_config": {**vision, **SINCE_4_24, **huge},
            "vision_config_dict": huge,
        }
    )
    assert (config.text_config.hidden_act, config.text_config.projection_dim) == ("gelu", 1024)
    assert config.vision_config.num_hidden_layers == 32


def test_published_configs_of_text_encoders_are_read():
    first = tower_config({**OF_STABLE_DIFFUSION, **sizes(768, 3072, 12, 12, 768)}, CLIPTextConfig)
    assert (first.hidden_act, first.eos_token_id) == ("quick_gelu", 2)
    second = {**OF_STABLE_DIFFUSION, **sizes(1024, 4096, 16, 23, 512), "hidden_act": "gelu"}
    assert tower_config(second, CLIPTextConfig).num_hidden_layers == 23


@pytest.mark.parametrize("kind", [transformers.CLIPTextConfig, transformers.CLIPVisionConfig, transformers.CLIPConfig])
def test_what_transformers_itself_writes_is_read(kind):
    values = kind().to_dict()
    assert values.keys() >= transformers.PretrainedConfig().to_dict().keys()
    if kind is transformers.CLIPConfig:
        read_clip_config(values)
    else:
        ours = CLIPTextConfig if kind is transformers.CLIPTextConfig else CLIPVisionConfig
        assert tower_config(values, ours) == ours()


def test_keys_without_effect_may_have_any_value():
    changed = {"chunk_size_feed_forward": 64, "torchscript": True, "top_k": 3, "dropout": 0.1, "use_cache": True}
    values = {**OF_STABLE_DIFFUSION, **changed}
    assert tower_config(values, CLIPTextConfig) == tower_config(OF_STABLE_DIFFUSION, CLIPTextConfig)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "vision", "projection_dim"),
    [
        ({}, {}, 512),
        (
            {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
            768,
        ),
    ],
    ids=["ViT-B/32", "ViT-L/14"],
)
def test_full_size_models(tmp_path, text, vision, projection_dim):
    torch.manual_seed(0)
    twin = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)).eval()
    twin.save_pretrained(tmp_path)
    model = FlaxCLIPModel.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids = np.stack([np.r_[BOS, rng.integers(0, 49000, n), [EOS] * (76 - n)] for n in (3, 20, 60)])
    pixels = draw_pixels(2, 224)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(ids), torch.from_numpy(pixels))
        features = twin.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
    ours = model(ids, pixels)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(ours[name], theirs[name].numpy(), atol=LOGITS_ATOL)
    np.testing.assert_allclose(model.get_image_features(pixels), features, atol=LOGITS_ATOL)
