"""The embedded data: real digits and real photographs that ship inside scikit-learn, as two 16x16 domains.

    digits_m       MNIST-M's recipe: the digit inverts the colours of a photograph
    digits_street  after SVHN: a coloured digit on a coloured ground, its neighbours cut off, uneven light, blur, noise

The 1,797 digits (UCI optdigits, 8x8) are split before anything else is done to them, and so are the photographs,
so that no held-out picture shares a digit or a patch with the training pictures.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_images

from jaxdiff.io.mnist_m import blend, random_crops

SIZE = 16
"""Height and width in pixels."""
VARIANTS = 8
"""Pictures that each training digit appears in, per domain."""
HELD_OUT_VARIANTS = 3
"""The same for a held-out digit."""
HELD_OUT = 0.2
"""Share of the digits, and of the photographs' width, that is never trained on."""
RECIPE_SEED = 20150528
"""Fixed: the embedded data is one data set, whatever the run's seed."""
DOMAINS = ("digits_m", "digits_street")

Masks = Float[np.ndarray, "N H W"]


def embedded_digits(
    held_out: bool,
) -> tuple[UInt8[np.ndarray, "N H W 3"], Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return (images, labels, domains) of the training part or of the held-out part."""
    rng = np.random.default_rng([RECIPE_SEED, int(held_out)])
    digits, labels = split_digits(held_out)
    variants = HELD_OUT_VARIANTS if held_out else VARIANTS
    digits, labels = np.tile(enlarge(digits), (variants, 1, 1)), np.tile(labels, variants)
    others = digits[rng.integers(0, len(digits), 2 * len(digits))]
    pictures = [
        render_m(draw(digits, rng), photographs(held_out), rng),
        render_street(draw(digits, rng), draw(others, rng), rng),
    ]
    domains = np.repeat(np.arange(len(DOMAINS), dtype=np.int32), len(labels))
    return np.concatenate(pictures), np.tile(labels, len(DOMAINS)), domains


def split_digits(held_out: bool) -> tuple[Masks, Int[np.ndarray, "N"]]:
    """Return the 8x8 digits, ink in [0, 1], and labels of one part; each class is split in the same proportion."""
    digits = load_digits()
    order = np.random.default_rng(RECIPE_SEED).permutation(len(digits.target))
    chosen = []
    for label in range(10):
        members = order[digits.target[order] == label]
        cut = round(len(members) * HELD_OUT)
        chosen.append(members[:cut] if held_out else members[cut:])
    indices = np.sort(np.concatenate(chosen))
    return digits.images[indices] / 16.0, digits.target[indices].astype(np.int32)


def photographs(held_out: bool) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Return the right-hand share of both photographs for held-out pictures, the rest for training."""
    parts = []
    for photo in load_sample_images().images:
        cut = round(photo.shape[1] * (1 - HELD_OUT))
        parts.append(photo[:, cut:] if held_out else photo[:, :cut])
    return parts


def enlarge(digits: Masks) -> Masks:
    """Return the digits four times as large with a blank margin, smooth enough to be drawn at any slant."""
    return ndimage.zoom(np.pad(digits, ((0, 0), (1, 1), (1, 1))), (1, 4, 4), order=1)


def draw(digits: Masks, rng: np.random.Generator) -> Masks:
    """Draw enlarged digits at SIZE with a random slant, size, turn and shift; ink stays in [0, 1]."""
    n, side = len(digits), digits.shape[1]
    angle, slant = rng.normal(0, 0.08, n), rng.normal(0, 0.08, n)
    scale = side / SIZE * rng.uniform(0.75, 0.95, n)
    shift = rng.uniform(-1, 1, (n, 2))
    y, x = np.meshgrid(*[np.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    y, x = y - shift[:, :1, None], x - shift[:, 1:, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    down = scale[:, None, None] * (cos * y + sin * x) + (side - 1) / 2
    right = scale[:, None, None] * (cos * x - sin * y + slant[:, None, None] * y) + (side - 1) / 2
    which = np.broadcast_to(np.arange(n)[:, None, None], down.shape)
    return ndimage.map_coordinates(digits, [which, down, right], order=1)


def render_m(
    masks: Masks, photos: list[UInt8[np.ndarray, "_ _ 3"]], rng: np.random.Generator
) -> UInt8[np.ndarray, "N H W 3"]:
    """Blend digits into photographs as MNIST-M does."""
    return blend(random_crops(photos, len(masks), SIZE, rng), masks > 0.45)


def render_street(masks: Masks, others: Masks, rng: np.random.Generator) -> UInt8[np.ndarray, "N H W 3"]:
    """Paint digits and the edges of their neighbours in one colour on a ground of another."""
    n = len(masks)
    ground, ink = contrasting_colours(n, rng)
    ink_mask = masks.copy()
    for side, mask in ((-1, others[:n]), (1, others[n:])):
        distance = rng.integers(11, 14, n)
        present = rng.random(n) < 0.6
        for offset in np.unique(distance):
            rows = present & (distance == offset)
            shifted = np.zeros((rows.sum(), SIZE, SIZE))
            kept = SIZE - offset
            if side < 0:
                shifted[:, :, :kept] = mask[rows][:, :, offset:]
            else:
                shifted[:, :, offset:] = mask[rows][:, :, :kept]
            ink_mask[rows] = np.maximum(ink_mask[rows], shifted)
    strength = np.clip((ink_mask[..., None] - 0.2) / 0.4, 0, 1)
    picture = ground[:, None, None, :] * (1 - strength) + ink[:, None, None, :] * strength
    slope = rng.normal(0, 12, (n, 2, 1, 1))
    ramp = np.linspace(-1, 1, SIZE)
    picture += (slope[:, 0] * ramp[None, :, None] + slope[:, 1] * ramp[None, None, :])[..., None]
    blur = rng.uniform(0, 0.2, n)[:, None, None, None]
    for axis in (1, 2):
        edges = ndimage.convolve1d(picture, [1.0, 0.0, 1.0], axis=axis, mode="nearest")
        picture = (1 - 2 * blur) * picture + blur * edges
    picture += rng.normal(0, 1, picture.shape) * rng.uniform(1, 6, n)[:, None, None, None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def contrasting_colours(
    number: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, "N 3"]]:
    """Return two colours in 0..255 a picture, of luma (Rec. 601) at least 80 apart."""
    first, second = rng.uniform(20, 235, (2, number, 3))
    luma = np.array([0.299, 0.587, 0.114])
    while (close := np.abs((first - second) @ luma) < 80).any():
        first[close], second[close] = rng.uniform(20, 235, (2, close.sum(), 3))
    return first, second
