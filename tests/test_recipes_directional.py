"""Learning directions: the norm stays, each step turns by a known angle, and the best direction is found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.recipes.directional import directional, with_norm

NORM, RATE = 0.4, 0.05
ROWS = {"<a>": np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32), "<b>": np.eye(16)[:1]}


def angle(a, b) -> np.ndarray:
    """Angles between rows in float64, accurate where they are small."""
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (np.asarray(a, float), np.asarray(b, float)))
    return 2 * np.arcsin(np.minimum(1, np.linalg.norm(a - b, axis=-1) / 2))


def learn(gradient_of, steps: int, prior: float, rate=RATE, start=ROWS):
    """Return the rows after each step."""
    optimizer = directional(lambda step: rate, NORM, start, prior)
    rows = with_norm(start, NORM)
    state, seen = optimizer.init(rows), [rows]
    for _ in range(steps):
        updates, state = optimizer.update(gradient_of(rows), state, rows)
        rows = optax.apply_updates(rows, updates)
        seen.append(rows)
    return seen


def test_norms_stay_and_every_step_turns_by_the_same_angle():
    rng = np.random.default_rng(1)
    noise = lambda rows: jax.tree.map(lambda row: jnp.asarray(1e3 * rng.standard_normal(row.shape)), rows)  # noqa: E731
    seen = learn(noise, 20, prior=1e-4)
    for before, after in zip(seen, seen[1:]):
        for word in ROWS:
            np.testing.assert_allclose(np.linalg.norm(after[word], axis=-1), NORM, rtol=1e-6)
            # v - eta g of a unit g at a right angle to v.
            np.testing.assert_allclose(angle(before[word], after[word]), np.arctan(RATE), rtol=1e-4)


def test_the_direction_of_least_loss_is_found_on_the_great_circle():
    target = {word: np.random.default_rng(2).standard_normal(row.shape) for word, row in ROWS.items()}
    seen = learn(lambda rows: jax.tree.map(lambda goal: -jnp.asarray(goal), target), 10, prior=0.0)
    for word in ROWS:
        # The steepest way of -<e, target> leads straight to the target, so the angle shrinks by all that is turned.
        whole = angle(seen[0][word], target[word])
        assert (whole > 10 * np.arctan(RATE)).all()
        np.testing.assert_allclose(angle(seen[-1][word], target[word]), whole - 10 * np.arctan(RATE), rtol=1e-4)


def test_the_prior_pulls_back_to_the_initialiser_as_strongly_as_it_says():
    moved = with_norm({word: row + 0.5 for word, row in ROWS.items()}, NORM)
    optimizer = directional(lambda step: RATE, NORM, ROWS, prior=0.1)
    state = optimizer.init(moved)
    nothing = jax.tree.map(jnp.zeros_like, moved)
    back = optax.apply_updates(moved, optimizer.update(nothing, state, moved)[0])
    # As dL/dv = m dL/de, this gradient of e is as strong as the prior, the other way.
    equal = with_norm(ROWS, 0.1 / NORM)
    weaker, stronger = (
        optax.apply_updates(moved, optimizer.update({w: s * g for w, g in equal.items()}, state, moved)[0])
        for s in (0.99, 1.01)
    )
    for word in ROWS:
        start = angle(moved[word], ROWS[word])
        np.testing.assert_allclose(angle(back[word], ROWS[word]), start - np.arctan(RATE), rtol=1e-4)
        np.testing.assert_allclose(angle(weaker[word], ROWS[word]), start - np.arctan(RATE), rtol=1e-3)
        np.testing.assert_allclose(angle(stronger[word], ROWS[word]), start + np.arctan(RATE), rtol=1e-3)


def test_a_gradient_along_the_vector_turns_nothing():
    seen = learn(lambda rows: {word: 3 * row for word, row in rows.items()}, 3, prior=0.0, start={"<b>": ROWS["<b>"]})
    np.testing.assert_allclose(seen[-1]["<b>"], seen[0]["<b>"], atol=1e-7)


@pytest.mark.parametrize("norm", [0.4, 7.0])
def test_rows_are_scaled_and_zeros_stay(norm):
    rows = with_norm({"<a>": np.float32([[3, 4], [0, 0]])}, norm)["<a>"]
    np.testing.assert_allclose(rows, [[0.6 * norm, 0.8 * norm], [0, 0]], rtol=1e-6)
