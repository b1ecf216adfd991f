"""The judge: it learns what is easy, is loaded instead of trained twice, and counts as other libraries count."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from tiny_model import untrained_judge

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Dataset, Splits
from jaxdiff.io.runs import read_json
from jaxdiff.mesh import make_mesh
from jaxdiff.models.classifier import ClassifierConfig
from jaxdiff.recipes import judge as judging
from jaxdiff.recipes.judge import (
    bootstrap_interval,
    confusion_matrix,
    load_judge,
    prepare_judge,
    recognise,
    train_judge,
)

# Figures


@pytest.mark.parametrize("num_classes", [2, 5])
def test_confusion_matrix_as_in_scikit_learn(num_classes):
    rng = np.random.default_rng(num_classes)
    # The last class is never asked for, and the first never recognised: both keep their row and column.
    wanted, recognised = rng.integers(0, num_classes - 1, 50), rng.integers(1, num_classes, 50)
    expected = sklearn.metrics.confusion_matrix(wanted, recognised, labels=range(num_classes))
    np.testing.assert_array_equal(confusion_matrix(wanted, recognised, num_classes), expected)


def noises(number, images, share, seed=0):
    """Return hits of `images` pictures a noise; noises differ in how hard they are, so that rows are alike inside."""
    rng = np.random.default_rng(seed)
    return rng.random((number, images)) < np.clip(share + 0.3 * rng.standard_normal((number, 1)), 0, 1)


@pytest.mark.parametrize(("number", "images", "share"), [(40, 10, 0.8), (200, 1, 0.5)])
def test_bootstrap_interval_as_in_scipy(number, images, share):
    correct = noises(number, images, share)
    rows = correct.mean(axis=1)
    theirs = scipy.stats.bootstrap(
        (rows,), np.mean, method="percentile", n_resamples=50_000, rng=np.random.default_rng(1)
    ).confidence_interval
    # The 2.5 % quantile of 2,000 draws from a normal distribution has a standard error of
    # sqrt(0.025 * 0.975 / 2000) / density(1.96) = 0.06 of its width; four of them.
    tolerance = 4 * 0.06 * rows.std() / np.sqrt(number)
    np.testing.assert_allclose(bootstrap_interval(correct, seed=0), theirs, atol=tolerance)


def test_pictures_of_one_noise_are_not_counted_as_independent():
    rows = noises(50, 1, 0.6)
    assert bootstrap_interval(np.repeat(rows, 7, axis=1), 0) == pytest.approx(bootstrap_interval(rows, 0), abs=1e-12)


@pytest.mark.parametrize("value", [False, True])
def test_hits_that_are_all_alike_leave_no_interval(value):
    assert bootstrap_interval(np.full((9, 2), value), 0) == (float(value), float(value))


def test_about_95_of_100_intervals_hold_the_true_share():
    share = 0.7
    held = [
        low <= share <= high
        for low, high in (
            bootstrap_interval(np.random.default_rng(seed).random((150, 1)) < share, seed, 400) for seed in range(300)
        )
    ]
    # Four standard errors of a binomial share, and 1 % for the 0.9 % steps that a share of 150 images moves in.
    assert abs(np.mean(held) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 300) + 0.01


# Recognition


@pytest.mark.parametrize("devices", [1, 8])
def test_recognition_pads_the_last_batch_and_gives_every_image_its_own_answer(devices):
    rng = np.random.default_rng(0)
    colours, noise = rng.integers(0, 200, (37, 1, 1, 3)), rng.integers(0, 50, (37, 4, 4, 3))
    images = (colours + noise).astype(np.uint8)
    judge, expected = untrained_judge(images, num_classes=5, num_domains=3)
    # 37 is no multiple of 32 images a device, and fewer than 8 x 32.
    for answers, answers_of_numpy in zip(recognise(judge, images, make_mesh(devices)), expected, strict=True):
        np.testing.assert_array_equal(answers, answers_of_numpy)


# Training


def easy(number, seed):
    """The class says which half is bright, the domain which colour it has."""
    rng = np.random.default_rng(seed)
    labels, domains = (rng.integers(0, 2, number).astype(np.int32) for _ in range(2))
    images = rng.integers(0, 60, (number, 4, 4, 3), dtype=np.uint8)
    for image, label, domain in zip(images, labels, domains):
        image[:, 2 * label : 2 * label + 2, 2 * domain] += 180
    return Dataset(images, labels, domains, ("left", "right"), ("red", "blue"))


STEPS = 30


CONFIG = ClassifierConfig(2, 2, channels=(16, 16))


@pytest.fixture(scope="module")
def narrow():
    """Judges are made narrower than they are, to be compiled sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "ClassifierConfig", partial(ClassifierConfig, channels=CONFIG.channels))
        yield


@pytest.fixture(scope="module")
def trained(narrow, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    splits = Splits(easy(256, 0), easy(101, 1))
    return run, splits, *prepare_judge(splits, STEPS, 0, make_mesh(1), run)


def test_a_judge_learns_what_is_easy_and_its_figures_say_so(trained):
    run, splits, judge, figures = trained
    held_out = splits.held_out
    verdict = recognise(judge, held_out.images, make_mesh(1))
    assert np.mean(verdict.classes == held_out.labels) > 0.95
    assert np.mean(verdict.domains == held_out.domains) > 0.95
    accuracy = sklearn.metrics.accuracy_score
    for d, domain in enumerate(("red", "blue")):
        here = np.flatnonzero(held_out.domains == d)
        assert figures[f"judge.real_images.{domain}"] == len(here)
        assert figures[f"judge.real_accuracy.{domain}"] == accuracy(held_out.labels[here], verdict.classes[here])
        assert figures[f"judge.real_domain_accuracy.{domain}"] == accuracy(
            held_out.domains[here], verdict.domains[here]
        )
    assert len(figures) == 6
    record = read_json(run / "judge.json")
    assert record["figures"] == figures
    assert record["class_names"] == ["left", "right"]
    assert record["domain_names"] == ["red", "blue"]
    assert record["image_shape"] == [4, 4, 3]


def assert_same_judge(first, second):
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_a_trained_judge_is_loaded_and_not_trained_again(trained, monkeypatch):
    run, splits, judge, figures = trained

    def no_training(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(judging, "fit", no_training)
    assert_same_judge(train_judge(splits.train, STEPS, 128, 0, make_mesh(1), run / "judge"), judge)
    again, again_figures = prepare_judge(splits, STEPS, 0, make_mesh(8), run)
    assert_same_judge(again, judge)
    assert again_figures == figures
    assert_same_judge(load_judge(run, CONFIG, (4, 4, 3), make_mesh(1)), judge)


def test_a_judge_that_was_never_trained_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"its judge .* run train_cfg"):
        load_judge(tmp_path, CONFIG, (4, 4, 3), make_mesh(1))
