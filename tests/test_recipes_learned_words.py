"""Learned words in a model's table and in prompts, against diffusers' own loader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from clip_vocabulary import vocabulary
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from stable_diffusion_twins import make_pipeline
from transformers import CLIPTextModel

from jaxdiff import FlaxStableDiffusionPipeline
from jaxdiff.errors import InputError
from jaxdiff.recipes.learned_words import TABLE, add_words, get_leaf, ids_of_words, spell_out, words_said
from jaxdiff.recipes.stable_diffusion import encode_texts

pytestmark = pytest.mark.usefixtures("quick_commands")
WORDS = {"bad_prompt": 2, "bad_prompt_version2": 3, "<one>": 1, "cat-toy": 12}
LEARNED = {
    word: np.random.default_rng(number).standard_normal((count, 32), np.float32)
    for number, (word, count) in enumerate(WORDS.items())
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose table is padded to a round size, as some published ones are."""
    folder = tmp_path_factory.mktemp("padded")
    make_pipeline(folder)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text_encoder.resize_token_embeddings(len(vocabulary()) + 6)
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    """diffusers' pipeline with all words, one file each."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    files = tmp_path_factory.mktemp("words")
    for word, rows in LEARNED.items():
        save_file({"emb_params": torch.from_numpy(rows)}, files / "word.safetensors")
        pipeline.load_textual_inversion(files / "word.safetensors", token=word)
    return pipeline


@pytest.fixture(scope="module")
def ours(folder):
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    model, with_words = add_words(pipeline.model, params, pipeline.tokenizer, LEARNED)
    return model, with_words, pipeline.tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat",
        "bad_prompt",
        "bad_prompt_version2",
        "bad_prompt_version2, bad_prompt_version2!",
        "a cat-toy, a <one> and bad_prompt",
        "a<one>cat and cat-toys",
        "bad_prompts",
    ],
)
def test_prompts_are_read_as_by_diffusers(ours, theirs, prompt):
    model, params, tokenizer = ours
    expected = theirs.tokenizer(
        theirs.maybe_convert_prompt(prompt, theirs.tokenizer), padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    found = tokenizer([spell_out(prompt, LEARNED)], length=77).input_ids
    np.testing.assert_array_equal(found, expected.numpy())
    with torch.no_grad():
        vectors = theirs.text_encoder(expected).last_hidden_state
    np.testing.assert_allclose(encode_texts(model, params, jnp.asarray(found)), vectors.numpy(), rtol=0, atol=1e-5)


def test_words_that_begin_alike_stay_whole_beside_each_other(theirs):
    """diffusers alone would tear the longer one here, so each is its own prompt there."""
    words = ["bad_prompt_version2", "bad_prompt", "a <one>", "bad_prompt_version2"]
    apart = [theirs.maybe_convert_prompt(word, theirs.tokenizer) for word in words]
    assert ", ".join(apart) != theirs.maybe_convert_prompt(", ".join(words), theirs.tokenizer)
    assert spell_out(", ".join(words), LEARNED) == ", ".join(apart)
    assert spell_out(", ".join(apart), LEARNED) == ", ".join(apart)
    assert spell_out("bad_prompt", {}) == "bad_prompt"


@pytest.mark.parametrize(
    "prompt",
    ["", "a photo", "bad_prompt_version2", "bad_prompts", "bad_prompt bad_prompt_version2", "cat-toys<one>"],
)
def test_what_a_prompt_says_is_what_the_tokenizer_makes_of_it(ours, prompt):
    _, _, tokenizer = ours
    found = set(tokenizer([spell_out(prompt, LEARNED)]).input_ids[0].tolist())
    ids = dict(zip(LEARNED, ids_of_words(tokenizer, LEARNED)))
    assert words_said(prompt, LEARNED) == {word for word in LEARNED if found & set(ids[word])}


def test_no_words_change_nothing_of_a_padded_table(folder):
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    model, same = add_words(pipeline.model, params, pipeline.tokenizer, {})
    assert model is pipeline.model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert len(get_leaf(same, TABLE)) == len(vocabulary()) + 6


def test_words_of_other_models_or_known_ones_are_refused(ours):
    model, params, tokenizer = ours
    with pytest.raises(InputError, match="<two>: its vectors have 8 numbers, but this model's tokens have 32"):
        add_words(model, params, tokenizer, {"<two>": np.ones((1, 8), np.float32)})
    with pytest.raises(InputError, match="<one> stands for something already"):
        add_words(model, params, tokenizer, {"<one>": np.ones((1, 32), np.float32)})
