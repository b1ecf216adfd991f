"""Test-time embedding adjustment against the same in NumPy, and what cannot be adjusted."""

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.recipes.embedding_adjustment import adjust_vector, adjust_words
from jaxdiff.recipes.learned_words import TABLE, get_leaf
from jaxdiff.recipes.tiny_stable_diffusion import make_tiny

RNG = np.random.default_rng(0)
V, C = np.float32(3 * RNG.standard_normal(64)), np.float32(RNG.standard_normal(64))


def angle(x, y) -> float:
    return float(np.arccos(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_a_vector_turns_in_its_plane_by_a_share_of_the_angle_to_a_given_length(alpha, beta):
    found = adjust_vector(V, C, alpha, beta)
    # By Gram and Schmidt: the unit vector at the wanted angle from v, towards c.
    first = V / np.linalg.norm(V)
    second = C - first * (first @ C)
    second /= np.linalg.norm(second)
    theta = alpha * angle(np.float64(V), np.float64(C))
    expected = beta * np.linalg.norm(C) * (np.cos(theta) * first + np.sin(theta) * second)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_vector_along_its_class_only_changes_its_length():
    np.testing.assert_allclose(adjust_vector(4 * C, C, 0.3, 1.5), 1.5 * C, rtol=1e-5)


def test_the_words_that_are_named_are_adjusted_and_no_others():
    pipeline, params = make_tiny("float32", "float32")
    table = np.asarray(get_leaf(params, TABLE))
    number = pipeline.tokenizer(["digit"]).input_ids[0][1]
    learned = {"<a>": np.stack([V, 2 * V]), "<b:c>": C[None]}
    found = adjust_words(learned, ["<a>:digit"], 0.2, 1.0, params, pipeline.tokenizer)
    assert found["<b:c>"] is learned["<b:c>"]
    for row, before in zip(found["<a>"], learned["<a>"]):
        np.testing.assert_allclose(np.linalg.norm(row), np.linalg.norm(table[number]), rtol=1e-5)
        np.testing.assert_allclose(angle(row, table[number]), 0.8 * angle(before, table[number]), rtol=1e-4)
    assert adjust_words(learned, ["<b:c>:digit"], 0.2, 1.0, params, pipeline.tokenizer)["<a>"] is learned["<a>"]
    for text, sentence in (
        ("<x>:digit", "<x> is no word of --embeddings or --adapters, which have <a>, <b:c>"),
        ("<a>:zzz", "'zzz' is not one token, but 'z' "),
        ("<a>: ", "' ' is not one token, but none"),
    ):
        with pytest.raises(InputError, match=sentence):
            adjust_words(learned, [text], 0.2, 1.0, params, pipeline.tokenizer)
    for rows, sentence in ((np.ones((1, 5), np.float32), "<a>: its vectors have 5 numbers"),
                           (np.zeros((1, 64), np.float32), "is zero, so it has no direction")):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            adjust_words({"<a>": rows}, ["<a>:digit"], 0.2, 1.0, params, pipeline.tokenizer)
