import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import recall_score, top_k_accuracy_score

from jaxdiff.recipes.classify import (
    Answers,
    answer,
    bootstrap_interval,
    calibration_error,
    choose_cases,
    class_weights,
    confused_pairs,
    figures_of,
    recalls,
)


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def draws():
    rng = np.random.default_rng(0)
    return unit(rng, 5000, 12), unit(rng, 7, 12), rng.integers(0, 7, 5000).astype(np.int32)


def test_weights_are_the_direction_of_the_mean():
    embeds = unit(np.random.default_rng(1), 6, 5)
    found = class_weights(embeds, [1, 3, 2])
    for row, part in zip(found, (embeds[:1], embeds[1:4], embeds[4:])):
        mean = part.astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.sqrt((mean**2).sum()), atol=1e-6)


def test_probabilities_and_figures_against_scipy_and_scikit_learn(draws):
    images, weights, labels = draws
    found = answer(images, weights, np.log(20.0), labels)
    wanted = softmax(20 * images.astype(np.float64) @ weights.astype(np.float64).T, axis=1)
    np.testing.assert_allclose(found.probabilities, -np.sort(-wanted, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(found.wanted_probability, wanted[np.arange(5000), labels], atol=1e-5)
    figures = figures_of(found, 7, seed=0)
    best = wanted.argmax(axis=1)
    assert figures["top1"] == pytest.approx((best == labels).mean())
    assert figures["top5"] == pytest.approx(top_k_accuracy_score(labels, wanted, k=5))
    assert figures["mean_per_class_recall"] == pytest.approx(recall_score(labels, best, average="macro"))
    np.testing.assert_allclose(recalls(found, 7), recall_score(labels, best, average=None))
    counts = sklearn_matrix(labels, best)
    np.fill_diagonal(counts, 0)
    pairs = confused_pairs(sklearn_matrix(labels, best), 3)
    assert [count for *_, count in pairs] == sorted(counts.ravel())[::-1][:3]
    assert all(counts[row, column] == count for row, column, count in pairs)


def test_the_interval_is_about_two_standard_errors_wide():
    low, high = bootstrap_interval(300, 1000, seed=0)
    error = np.sqrt(0.3 * 0.7 / 1000)
    # 2000 resamples leave about 3 % of noise in the ends.
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.1 * error + 1e-3)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.1 * error + 1e-3)
    assert bootstrap_interval(10, 10, seed=0) == (1.0, 1.0)


def test_calibration_error_of_known_gaps():
    # Two bins: confidence 0.9 and accuracy 0.5 over four pictures, confidence 0.3 and accuracy 0 over two.
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 0.3], np.float32)
    correct = np.array([True, False, True, False, False, False])
    assert calibration_error(confidence, correct) == pytest.approx((4 * 0.4 + 2 * 0.3) / 6, abs=1e-6)
    assert calibration_error(np.ones(3, np.float32), np.ones(3, bool)) == 0


def test_cases_are_drawn_from_both_kinds_by_the_seed():
    labels = np.arange(20, dtype=np.int32) % 4
    top = labels[:, None].copy()
    top[:3] = 9
    shares = np.ones((20, 1), np.float32)
    answers = Answers(top, shares, labels, shares[:, 0])
    right, wrong = choose_cases(answers, 5, seed=0)
    assert len(right) == 5
    assert set(wrong) == {0, 1, 2}
    assert not set(right) & {0, 1, 2}
    np.testing.assert_array_equal(right, choose_cases(answers, 5, seed=0)[0])
    assert list(right) != list(choose_cases(answers, 5, seed=1)[0])
