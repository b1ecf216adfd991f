"""Data sets: the embedded digits are fair to judge by, splits stratified, and batches depend on (seed, step) alone."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.interpolate import RectBivariateSpline
from sklearn.datasets import load_sample_images

from jaxdiff.errors import InputError
from jaxdiff.io import digits
from jaxdiff.io.datasets import (
    Dataset,
    Splits,
    batches,
    check_data,
    check_splits,
    choose_held_out,
    describe,
    load_data,
)


@pytest.fixture(scope="module")
def embedded():
    return load_data("digits")


def numbered(number, classes=1, domains=1):
    """Return a data set whose pictures all differ: picture i holds the bytes of i."""
    order = np.arange(number, dtype=np.int32)
    images = order.astype("<u4").view(np.uint8).reshape(number, 1, 4, 1).repeat(3, axis=-1)
    names = tuple(map(str, range(classes))), tuple(f"domain{i}" for i in range(domains))
    return Dataset(images, order % classes, order // classes % domains, *names)


def numbers_of(images):
    return np.ascontiguousarray(images[..., 0]).view("<u4").ravel()


# --- the embedded digits


def test_embedded_counts(embedded):
    # 1,797 digits of 174 to 183 a class; a fifth of each class is held out.
    for part, variants in ((embedded.train, digits.VARIANTS), (embedded.held_out, digits.HELD_OUT_VARIANTS)):
        assert part.images.shape[1:] == (16, 16, 3)
        assert part.domain_names == ("digits_m", "digits_street")
        assert (part.counts()[0] == part.counts()[1]).all()
        assert (part.counts() % variants == 0).all()
    per_class = (
        embedded.train.counts()[0] // digits.VARIANTS + embedded.held_out.counts()[0] // digits.HELD_OUT_VARIANTS
    )
    assert per_class.sum() == 1797
    held_out = embedded.held_out.counts()[0] / digits.HELD_OUT_VARIANTS / per_class
    assert (np.abs(held_out - 0.2) < 0.5 / 174).all()


def test_embedded_data_is_one_data_set(embedded):
    images, labels, domains = digits.embedded_digits(True)
    assert (images == embedded.held_out.images).all()
    assert (labels == embedded.held_out.labels).all()
    assert (domains == embedded.held_out.domains).all()


def test_no_digit_is_in_both_parts():
    train, held_out = (digits.split_digits(part)[0] for part in (False, True))
    assert len(train) + len(held_out) == 1797
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in held_out}


def test_no_patch_of_a_photograph_is_in_both_parts():
    strips = [{s.tobytes() for s in digits.photographs(part)} for part in (False, True)]
    assert not strips[0] & strips[1]
    area = sum(s.shape[0] * s.shape[1] for part in (False, True) for s in digits.photographs(part))
    assert area == sum(photo.shape[0] * photo.shape[1] for photo in load_sample_images().images)


def test_drawn_digit_without_chance_is_the_digit():
    class Centred(np.random.Generator):
        """Every draw is the middle of its distribution."""

        def normal(self, mean, deviation, n):
            return np.full(n, mean)

        def uniform(self, low, high, n):
            return np.full(n, (low + high) / 2)

    original, _ = digits.split_digits(True)
    drawn = digits.draw(digits.enlarge(original), np.arange(len(original)), Centred(np.random.PCG64()))
    # At scale 0.85 pixel i of 16 lies 2.125 (i - 7.5) from the middle of the 40 that stand for the 10 with the margin.
    places = (2.125 * (np.arange(16) - 7.5) + 19.5) * 9 / 39
    for mask, digit in zip(drawn[:50], original):
        # Mirrored at its margin, which is what ndimage's spline assumes of the pixels outside.
        mirrored = np.pad(np.pad(digit, 1), 9, mode="reflect")
        spline = RectBivariateSpline(range(-9, 19), range(-9, 19), mirrored, kx=3, ky=3)
        np.testing.assert_allclose(mask, spline(places, places).clip(0, 1), atol=0.08)


def test_patches_on_which_a_digit_is_lost_are_refused():
    flat = [np.full((16, 16, 3), value, np.uint8) for value in (0, 60, 128, 200, 255)]
    chess = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    visible = digits.inverts_visibly(np.stack([*flat, chess]))
    assert visible.tolist() == [True, True, False, True, True, False]


def test_street_colours_differ_in_brightness():
    ground, ink = digits.contrasting_colours(1000, np.random.default_rng(0))
    luma = [np.asarray(Image.fromarray(c[None].round().astype(np.uint8)).convert("L"), float) for c in (ground, ink)]
    assert np.abs(luma[0] - luma[1]).min() > 77


def test_street_digit_shows_in_the_picture():
    rng = np.random.default_rng(0)
    original, _ = digits.split_digits(True)
    masks = digits.draw(digits.enlarge(original), np.arange(len(original)), rng)
    pictures = digits.render_street(masks, [np.zeros_like(masks)] * 2, rng)
    luma = pictures.astype(float) @ np.array([0.299, 0.587, 0.114])
    match = [abs(np.corrcoef(mask.ravel(), picture.ravel())[0, 1]) for mask, picture in zip(masks, luma)]
    assert np.quantile(match, 0.05) > 0.75


# --- splits and checks


def test_held_out_share_of_each_class():
    data = numbered(1000, classes=5, domains=2)
    chosen = choose_held_out(data)
    assert (data.subset(chosen).counts() == 10).all()
    assert (data.subset(~chosen).counts() == 90).all()
    assert (choose_held_out(data) == chosen).all()


def test_one_class_does_not_change_the_split_of_another():
    data = numbered(300, classes=3)
    without = data.labels != 1
    assert (choose_held_out(data.subset(without)) == choose_held_out(data)[without]).all()


@pytest.mark.parametrize(("pictures", "held_out"), [(1, 0), (2, 1), (5, 1), (25, 2)])
def test_small_classes(pictures, held_out):
    assert choose_held_out(numbered(pictures)).sum() == held_out


def test_check_data_counts_and_describe_agrees():
    data = numbered(60, classes=3, domains=2)
    figures = check_data(Splits(data.subset(np.arange(48)), data.subset(np.arange(48, 60)), ("a.png: cut",)))
    assert figures["train"]["domain0"] == {"0": 8, "1": 8, "2": 8}
    assert figures["held_out"]["domain1"] == {"0": 2, "1": 2, "2": 2}
    assert (figures["height"], figures["width"], figures["channels"], figures["skipped"]) == (1, 4, 3, ["a.png: cut"])
    text = describe(Splits(data, data, ("a.png: cut",)))
    assert "a.png: cut" in text
    assert "30 pictures, 10 to 10 a class" in text


def test_one_per_cent_may_be_skipped_and_no_more():
    data = numbered(99)
    check_splits("x", Splits(data.subset(np.arange(90)), data.subset(np.arange(90, 99)), ("a: cut",)))
    with pytest.raises(InputError, match=r"2 of 101 pictures cannot be read, more than 1%; the first is a: cut"):
        check_splits("x", Splits(data.subset(np.arange(90)), data.subset(np.arange(90, 99)), ("a: cut", "b: cut")))


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (lambda d: d.labels >= 0, lambda d: d.labels < 0, "no held-out pictures"),
        (lambda d: d.labels < 0, lambda d: d.labels >= 0, "no training pictures"),
        (lambda d: d.domains == 0, lambda d: d.domains >= 0, "no training pictures of domain domain1"),
        (lambda d: d.labels != 2, lambda d: d.labels >= 0, "no training pictures of class 2"),
    ],
)
def test_what_cannot_be_trained_or_judged_is_an_error(train, held_out, message):
    data = numbered(60, classes=3, domains=2)
    with pytest.raises(InputError, match=message):
        check_splits("x", Splits(data.subset(train(data)), data.subset(held_out(data))))


def test_image_size_resizes_the_embedded_digits(embedded):
    resized = load_data("digits", 28)
    assert resized.train.images.shape == (*embedded.train.images.shape[:1], 28, 28, 3)
    expected = Image.fromarray(embedded.held_out.images[5]).resize((28, 28), Image.Resampling.BICUBIC)
    assert (resized.held_out.images[5] == np.asarray(expected)).all()


def test_loading_needs_neither_tfds_nor_torch():
    code = (
        "import sys; from jaxdiff.io.datasets import load_data; load_data('digits'); "
        "bad = [m for m in ('tensorflow_datasets', 'tensorflow', 'torch') if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- batches


def test_each_epoch_shows_each_picture_once_in_a_new_order():
    data, batch_size = numbered(100), 30
    batch_at = batches(data, 7, batch_size)
    shown = np.concatenate([numbers_of(batch_at(k).images) for k in range(10)])
    epochs = shown.reshape(3, 100)
    assert (np.sort(epochs) == np.arange(100)).all()
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != np.arange(100)).any()


def test_batch_depends_on_seed_and_step_only():
    data = numbered(50)
    forwards, fresh = batches(data, 3, 8), batches(data, 3, 8)
    expected = [numbers_of(forwards(k).images) for k in range(20)]
    for k in (13, 2, 19, 0):
        assert (numbers_of(fresh(k).images) == expected[k]).all()
    assert (numbers_of(batches(data, 4, 8)(0).images) != expected[0]).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_slices_of_processes_make_up_the_batch(processes):
    data = numbered(30, classes=3, domains=2)
    whole = batches(data, 0, 8)
    parts = [batches(data, 0, 8, index, processes) for index in range(processes)]
    for k in (0, 3, 11):
        for name in ("images", "labels", "domains"):
            joined = np.concatenate([getattr(part(k), name) for part in parts])
            assert (joined == getattr(whole(k), name)).all()


def test_images_keep_their_labels():
    data = numbered(40, classes=4, domains=2)
    batch = batches(data, 0, 100)(2)
    number = numbers_of(batch.images)
    assert (batch.labels == data.labels[number]).all()
    assert (batch.domains == data.domains[number]).all()


def test_batch_that_cannot_be_divided_is_an_error():
    with pytest.raises(InputError, match="batch of 6 cannot be divided equally by 4 processes"):
        batches(numbered(10), 0, 6, 0, 4)
