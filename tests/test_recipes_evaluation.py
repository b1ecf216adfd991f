"""Evaluation: figures under their names, single pictures where a grader looks for them, and pictures with labels."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_model import CLASSES, DOMAINS, SHAPE, tiny_model, untrained_judge

from jaxdiff.io.images import to_float
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes.evaluation import (
    Samples,
    deliver,
    domain_grid,
    draw_samples,
    judge_figures,
    judge_samples,
    reverse_strips,
)
from jaxdiff.settings import SamplingSettings

D, K = len(DOMAINS), len(CLASSES)
# Pure colours that neither text nor its edges have: grey letters on white mix to greys.
COLOURS = np.array([[240, 16, 40], [16, 240, 200]], np.uint8)


class Painter(nn.Module):
    """Answer that every clean picture is the colour of its domain."""

    @nn.compact
    def __call__(self, x_t, t, class_labels, domain_labels, train=False):
        colour = to_float(jnp.asarray(COLOURS))[domain_labels % D]
        return jnp.broadcast_to(colour[:, None, None, :], x_t.shape)


MODEL = tiny_model(Painter(), "x_0")


def random_pictures(per_class):
    """Return pictures of one colour each, no two alike and none white or grey."""
    number = D * K * per_class
    colours = np.stack([np.arange(number) % 256, 255 - np.arange(number) % 256, np.full(number, 100)], axis=-1)
    pictures = np.broadcast_to(colours[:, None, None, :], (number, *SHAPE)).astype(np.uint8)
    return pictures.reshape(D, K, per_class, *SHAPE)


# Samples


def coding_sampler(params, keys, condition):
    """Return pictures that hold class, domain and a number of their key in their three channels."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (), minval=-1.0))(keys)
    codes = jnp.stack([condition.class_labels / 10, condition.domain_labels / 10, noise], axis=-1)
    return jnp.broadcast_to(codes[:, None, None, :], (len(keys), *SHAPE))


def test_samples_lie_by_domain_class_and_noise_and_share_their_noises():
    per_class = 3
    images = draw_samples(coding_sampler, MODEL, {}, per_class, 0, 8, make_mesh(8))
    assert images.shape == (D, K, per_class, *SHAPE)
    codes = np.rint((images[..., 0, 0, :2] / 127.5 - 1) * 10)
    np.testing.assert_array_equal(codes[..., 0], np.broadcast_to(np.arange(K)[None, :, None], (D, K, per_class)))
    np.testing.assert_array_equal(codes[..., 1], np.broadcast_to(np.arange(D)[:, None, None], (D, K, per_class)))
    noise = images[..., 0, 0, 2]
    assert (noise == noise[0, 0]).all()
    assert len(np.unique(noise[0, 0])) == per_class


def test_every_sample_gets_its_own_verdict():
    pictures = random_pictures(7)
    judge, (classes, domains) = untrained_judge(pictures.reshape(-1, *SHAPE), K, D)
    samples = judge_samples(judge, pictures, make_mesh(1))
    np.testing.assert_array_equal(samples.images, pictures)
    np.testing.assert_array_equal(samples.classes, classes.reshape(D, K, 7))
    np.testing.assert_array_equal(samples.domains, domains.reshape(D, K, 7))


# Figures


def made_samples():
    """4 noises a class. Ink: ant 4, bee 2 and cow 0 of 4 right; oil: all right. Domains: ink 9 of 12, oil 12."""
    classes = np.array([[[0, 0, 0, 0], [1, 2, 1, 0], [0, 1, 0, 1]], [[0] * 4, [1] * 4, [2] * 4]])
    domains = np.array([[[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], [[1] * 4] * 3])
    return Samples(random_pictures(4), classes, domains)


def test_figures_of_hand_made_samples():
    figures = judge_figures(MODEL, made_samples(), seed=0)
    accuracy = "judge.sample_accuracy"
    ink, oil = DOMAINS
    exact = {
        f"judge.samples.{ink}": 12,
        f"judge.samples.{oil}": 12,
        f"judge.sample_domain_accuracy.{ink}": Fraction(9, 12),
        f"judge.sample_domain_accuracy.{oil}": 1,
        f"{accuracy}.{ink}": Fraction(6, 12),
        f"{accuracy}.{oil}": 1,
        f"{accuracy}.{ink}.ant": 1,
        f"{accuracy}.{ink}.bee": Fraction(2, 4),
        f"{accuracy}.{ink}.cow": 0,
        **{f"{accuracy}.{oil}.{name}": 1 for name in CLASSES},
    }
    for name, value in exact.items():
        assert figures[name] == pytest.approx(float(value), abs=1e-12), name
    intervals = {name.removeprefix(f"{accuracy}.") for name in exact if name.startswith(f"{accuracy}.")}
    assert set(figures) == set(exact) | {f"{accuracy}_{end}.{name}" for name in intervals for end in ("low", "high")}
    for name in intervals:
        low, value, high = (figures[f"{accuracy}{end}.{name}"] for end in ("_low", "", "_high"))
        if value in (0, 1):
            assert low == value == high
        else:
            assert 0 <= low < value < high <= 1


def test_a_noise_is_what_varies_in_a_domain_and_an_image_in_a_class():
    # Every noise gets exactly one of its three classes right, so resampling noises changes nothing at all.
    right = np.eye(3, dtype=bool)[:, [0, 1, 2, 0]]
    wanted = np.arange(K)[:, None]
    classes = np.broadcast_to(np.where(right, wanted, (wanted + 1) % K), (D, K, 4))
    figures = judge_figures(MODEL, Samples(random_pictures(4), classes, np.zeros((D, K, 4), int)), seed=0)
    for end in ("_low", "", "_high"):
        assert figures[f"judge.sample_accuracy{end}.ink"] == pytest.approx(1 / 3)
    assert figures["judge.sample_accuracy_low.ink.ant"] < figures["judge.sample_accuracy_high.ink.ant"]


# Files


def test_single_pictures_are_delivered_under_the_names_a_grader_reads(tmp_path):
    pictures = random_pictures(12)
    folders = deliver(tmp_path / "samples", MODEL, pictures, 11)
    assert folders == [tmp_path / "samples" / name for name in DOMAINS]
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {f"samples/{d}/{k}_{n:03d}.png" for d in DOMAINS for k in CLASSES for n in range(1, 12)}
    for d, k, n in ((0, 0, 0), (0, 2, 10), (1, 1, 4)):
        with Image.open(tmp_path / "samples" / DOMAINS[d] / f"{CLASSES[k]}_{n + 1:03d}.png") as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pictures[d, k, n])


# Pictures


def place_of(canvas, colour):
    """Return (top, left, height, width) of a colour's rectangle, which must be full, or None."""
    rows, columns = np.nonzero((canvas == colour).all(axis=-1))
    if not len(rows):
        return None
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == height * width
    return rows.min(), columns.min(), height, width


def has_ink(part):
    return (part < 128).any()


def test_a_grid_shows_the_first_ten_noises_of_every_class_with_labels():
    pictures = random_pictures(12)[1]
    canvas = domain_grid(MODEL, pictures, "oil", SamplingSettings(num_steps=5))
    places = [[place_of(canvas, picture[0, 0]) for picture in row] for row in pictures]
    assert [row[10:] for row in places] == [[None, None]] * K
    tops, lefts, heights, widths = np.array([row[:10] for row in places]).transpose(2, 0, 1)
    # Pictures of 4 pixels are enlarged 16 times, to the 64 pixels of a cell.
    assert (heights == 64).all()
    assert (widths == 64).all()
    assert (np.diff(tops, axis=0) > 64).all()
    assert (np.diff(lefts, axis=1) > 64).all()
    height, width, _ = canvas.shape
    assert K * 64 < height < K * 64 + 200
    assert 10 * 64 < width < 10 * 64 + 300
    for top in tops[:, 0]:
        assert has_ink(canvas[top : top + 64, : lefts[0, 0]])
    for left in lefts[0]:
        assert has_ink(canvas[tops[0, 0] - 30 : tops[0, 0], left : left + 64])


@pytest.mark.parametrize(("devices", "num_steps", "shown"), [(8, 5, 6), (1, 2, 3)])
def test_strips_show_the_noisy_states_and_the_clean_images_of_every_domain(devices, num_steps, shown):
    settings = SamplingSettings(num_steps=num_steps, guidance_scale=1.0)
    strips = reverse_strips(MODEL, {}, settings, 0, make_mesh(devices))
    assert len(strips) == D
    for canvas, colour, other in zip(strips, COLOURS, COLOURS[::-1]):
        clean = (canvas == colour).all(axis=-1)
        # One row of clean images, 4 pixels enlarged to 112 each, and, above its end, the last state, which is clean.
        assert clean.sum() == (shown + 1) * 112**2
        assert not (canvas == other).all(axis=-1).any()
        rows, columns = np.flatnonzero(clean.any(axis=1)), np.flatnonzero(clean.any(axis=0))
        assert len(rows) == 2 * 112
        assert len(columns) == shown * 112
        assert clean[rows[0]].sum() == 112
        assert clean[rows[0], columns[-1]]
        height, width, _ = canvas.shape
        assert 2 * 112 < height < 2 * 112 + 200
        assert shown * 112 < width < shown * 112 + 300
        # The states before the last are noise: many colours, none of them clean.
        first = canvas[rows[0] : rows[0] + 112, columns[0] : columns[0] + 112]
        assert len(np.unique(first.reshape(-1, 3), axis=0)) == 16
        for top in (rows[0], rows[112]):
            assert has_ink(canvas[top : top + 112, : columns[0]])
        for left in columns[::112]:
            assert has_ink(canvas[rows[0] - 25 : rows[0], left : left + 112])
