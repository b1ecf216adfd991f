"""Prompt weights against float64 written from the definitions: gradients, root finding, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy as scipy_entropy

from jaxdiff.recipes.classify import class_weights
from jaxdiff.recipes.prompt_weights import (
    BETA,
    autoclip_gradient,
    autoclip_weights,
    cosines_of,
    inner_products,
    weighted_logits,
    zpe_weights,
)

N, K, P, F = 5, 4, 6, 16
SCALE = float(np.log(100))
ATOL = 1e-5
"""Sums of a few float32 numbers below 1, after a float32 softmax."""


@pytest.fixture
def embeds():
    rng = np.random.default_rng(0)
    images, prompts = rng.standard_normal((N, F)), 0.5 * rng.standard_normal((K, P, F))
    prompts += rng.standard_normal((K, 1, F))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, prompts)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32)


@pytest.fixture
def cosines(embeds):
    return cosines_of(*embeds)


def test_cosines_by_picture_class_and_prompt(embeds, cosines):
    images, prompts = embeds
    assert cosines.shape == (N, K, P)
    np.testing.assert_allclose(cosines[3, 2, 1], images[3].astype(float) @ prompts[2, 1].astype(float), atol=ATOL)


def test_the_step_of_autoclip_is_the_gradient_that_jax_finds(cosines):
    def objective(rho, c):
        return jax.nn.logsumexp(c @ jax.nn.softmax(rho))

    wanted = jax.vmap(jax.grad(objective), (None, 0))(jnp.zeros(P), jnp.asarray(cosines))
    np.testing.assert_allclose(autoclip_gradient(cosines), wanted, atol=1e-7)


def test_the_step_of_autoclip_is_the_slope_of_its_objective(cosines):
    def objective(rho, c):
        weights = np.exp(rho) / np.exp(rho).sum()
        return logsumexp([sum(weights[p] * row[p] for p in range(P)) for row in c])

    step = 1e-5
    for c, found in zip(cosines.astype(np.float64), autoclip_gradient(cosines)):
        slopes = [(objective(step * e, c) - objective(-step * e, c)) / (2 * step) for e in np.eye(P)]
        np.testing.assert_allclose(found, slopes, atol=1e-7)
        # Adding one number to all of rho changes nothing.
        assert abs(found.sum()) < 1e-6


@pytest.mark.parametrize("beta", [0.3, BETA, 0.99])
def test_autoclip_goes_up_its_gradient_until_the_entropy_is_reached(cosines, beta):
    found = autoclip_weights(cosines, beta)
    for weights, gradient in zip(found, autoclip_gradient(cosines).astype(np.float64)):
        alpha = brentq(lambda a, g=gradient: scipy_entropy(scipy_softmax(a * g)) - beta * np.log(P), 0, 1e6)
        np.testing.assert_allclose(weights, scipy_softmax(alpha * gradient), atol=1e-4)
        assert scipy_entropy(weights) == pytest.approx(beta * np.log(P), abs=1e-4)


def test_limits_of_autoclip(cosines):
    np.testing.assert_allclose(autoclip_weights(cosines, 1.0), 1 / P, atol=1e-3)
    # Prompts that all say the same stay equal, and nothing is divided by zero.
    same = np.repeat(cosines[..., :1], P, axis=2)
    np.testing.assert_allclose(autoclip_weights(same), 1 / P, atol=1e-6)
    # Almost no entropy: the prompt of the largest gradient alone.
    best = autoclip_weights(cosines, 1e-4).argmax(axis=1)
    np.testing.assert_array_equal(best, autoclip_gradient(cosines).argmax(axis=1))
    assert autoclip_weights(cosines, 1e-4).max(axis=1).min() > 0.99


def test_equal_weights_are_the_plain_ensemble(embeds, cosines):
    images, prompts = embeds
    found = weighted_logits(cosines, inner_products(prompts), np.full((N, P), 1 / P, np.float32), SCALE)
    plain = images @ class_weights(prompts.reshape(K * P, F), [P] * K).T
    np.testing.assert_allclose(found, 100 * plain, atol=1e-3)


def test_logits_of_weights_that_differ_from_picture_to_picture(embeds, cosines):
    images, prompts = embeds
    weights = np.random.default_rng(1).dirichlet(np.ones(P), N).astype(np.float32)
    found = weighted_logits(cosines, inner_products(prompts), weights, SCALE)
    for n in range(N):
        for k in range(K):
            query = sum(float(weights[n, p]) * prompts[k, p].astype(np.float64) for p in range(P))
            wanted = 100 * (images[n] @ query) / np.sqrt(query @ query)
            assert found[n, k] == pytest.approx(wanted, abs=1e-3)
    # All weight on one prompt leaves that prompt.
    one = np.eye(P, dtype=np.float32)[np.full(N, 2)]
    np.testing.assert_allclose(
        weighted_logits(cosines, inner_products(prompts), one, SCALE), 100 * images @ prompts[:, 2].T, atol=1e-3
    )


def test_zpe_scores_against_loops(embeds, monkeypatch):
    images, prompts = embeds
    logits = 100 * np.array([[[i @ p for p in row] for row in prompts.astype(float)] for i in images.astype(float)])
    scores = []
    for p in range(P):
        usual = [np.mean([logits[n][k][p] for n in range(N)]) for k in range(K)]
        scores.append(np.mean([max(logits[n][k][p] - usual[k] for k in range(K)) for n in range(N)]))
    wanted = np.exp(scores) / np.sum(np.exp(scores))
    np.testing.assert_allclose(zpe_weights(images, prompts, SCALE), wanted, rtol=1e-3)
    # Few pictures at a time are the same pictures.
    monkeypatch.setattr("jaxdiff.recipes.prompt_weights.pictures_at_once", lambda _: 2)
    np.testing.assert_allclose(zpe_weights(images, prompts, SCALE), wanted, rtol=1e-3)


def test_zpe_gives_equal_prompts_equal_weights_and_follows_the_one_that_tells_pictures_apart(embeds):
    images, prompts = embeds
    same = np.repeat(prompts[:, :1], P, axis=1)
    np.testing.assert_allclose(zpe_weights(images, same, SCALE), 1 / P, atol=1e-6)
    # A prompt that gives all classes the same logit, whatever the picture, ends with the smallest weight.
    blind = prompts.copy()
    mean = images.astype(np.float64).mean(axis=0)
    spare = np.linalg.svd(images - mean)[2][-1]
    blind[:, 3] = spare / np.linalg.norm(spare)
    found = zpe_weights(images, blind, SCALE)
    assert found.argmin() == 3
    assert found.sum() == pytest.approx(1, abs=1e-6)
