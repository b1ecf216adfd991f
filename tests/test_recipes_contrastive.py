import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import FLOAT32_ATOL

from jaxdiff.io.digit_captions import ANYWHERE, CAPTIONS, CLASS_NAMES, CONTEXT, caption_ids, caption_vocabulary
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import make_mesh, put_batch, replicated
from jaxdiff.models.clip import CLIP
from jaxdiff.recipes.contrastive import (
    PREPROCESSOR,
    contrastive_loss,
    make_batches,
    make_contrastive_loss,
    tiny_config,
    true_pairs,
)

pytestmark = pytest.mark.usefixtures("quick_commands")


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(*caption_vocabulary(), CONTEXT)


def test_one_true_caption_a_picture_is_the_loss_of_clip():
    logits = np.random.default_rng(0).normal(0, 4, (6, 6)).astype(np.float32)
    theirs = torch.from_numpy(logits)
    target = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    wanted = (entropy(theirs, target) + entropy(theirs.T, target)) / 2
    found = contrastive_loss(jnp.asarray(logits), jnp.eye(6, dtype=bool))
    np.testing.assert_allclose(found, wanted.numpy(), atol=FLOAT32_ATOL)


def test_several_true_captions_share_the_target():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, (8, 8)).astype(np.float32)
    true = np.eye(8, dtype=bool) | (rng.random((8, 8)) < 0.3)
    theirs, targets = torch.from_numpy(logits), torch.from_numpy(true).float()
    entropy = torch.nn.functional.cross_entropy
    of_pictures = entropy(theirs, targets / targets.sum(1, keepdim=True))
    of_captions = entropy(theirs.T, targets.T / targets.T.sum(1, keepdim=True))
    found = contrastive_loss(jnp.asarray(logits), jnp.asarray(true))
    np.testing.assert_allclose(found, ((of_pictures + of_captions) / 2).numpy(), atol=FLOAT32_ATOL)


def test_a_caption_is_true_of_its_class_and_where_it_names_one_its_domain():
    labels, domains, spoken = jnp.array([3, 3, 5]), jnp.array([0, 1, 0]), jnp.array([ANYWHERE, 1, 0])
    classes = jnp.array([[number == 3 for number in range(10)]] * 2 + [[number in (4, 5) for number in range(10)]])
    wanted = [[True, False, False], [True, True, False], [False, False, True]]
    assert true_pairs(labels, domains, classes, spoken).tolist() == wanted


def test_batches_are_pure_functions_of_seed_and_step_and_their_captions_are_true(tokenizer):
    batch_at = make_batches(tokenizer, 32, seed=3)
    batch = batch_at(7)
    for ours, again in zip(batch, make_batches(tokenizer, 32, seed=3)(7)):
        np.testing.assert_array_equal(ours, again)
    assert (batch_at(8).images != batch.images).any()
    assert true_pairs(*map(jnp.asarray, (batch.labels, batch.domains, batch.classes, batch.spoken))).diagonal().all()
    texts = caption_ids(tokenizer)
    for ids, label, spoken in zip(batch.input_ids, batch.labels, batch.spoken):
        found = np.argwhere((texts == ids).all(axis=-1))
        assert {tuple(place) for place in found} <= {(c, label) for c, (_, d) in enumerate(CAPTIONS) if d == spoken}
        assert len(found) == 1


def test_every_word_of_the_captions_is_one_token(tokenizer):
    for caption, _ in CAPTIONS:
        for name in CLASS_NAMES:
            text = caption.replace("{}", name)
            signs = text.count(".") + text.count(",")
            assert tokenizer([text]).attention_mask.sum() == len(text.split()) + signs + 2, text
    # Other words are spelt.
    assert tokenizer(["zebra"]).attention_mask.sum() > 3


def test_a_batch_on_eight_devices_has_the_loss_and_gradient_of_one(tokenizer):
    batch = make_batches(tokenizer, 16, seed=0)(0)
    config = tiny_config(len(caption_vocabulary()[0]), tokenizer.pad_id)
    towers = [dataclasses.replace(tower, num_hidden_layers=1) for tower in (config.text_config, config.vision_config)]
    model = CLIP(dataclasses.replace(config, text_config=towers[0], vision_config=towers[1]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch.input_ids[:1], jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    grads = jax.jit(jax.value_and_grad(make_contrastive_loss(model)))
    results = []
    for devices in (1, 8):
        mesh = make_mesh(devices)
        results.append(grads(jax.device_put(params, replicated(mesh)), put_batch(batch, mesh), None))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for one, eight in zip(*(jax.tree.leaves(result[1]) for result in results)):
        np.testing.assert_allclose(one, eight, atol=1e-4)


def test_the_preprocessing_of_the_digits_is_known_to_transformers():
    from transformers import CLIPImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil(**PREPROCESSOR.to_dict())(pixels, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(PREPROCESSOR(pixels), theirs)
