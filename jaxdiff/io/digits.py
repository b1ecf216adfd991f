"""The embedded data: real digits and real photographs that ship inside scikit-learn, as two 16x16 domains.

    digits_m       MNIST-M's recipe: the digit inverts the colours of a photograph
    digits_street  after SVHN: a coloured digit on a coloured ground, its neighbours cut off, uneven light, blur, noise

The 1,797 digits (UCI optdigits, 8x8) are split before anything else is done to them, and so are the photographs,
so that no held-out picture shares a digit or a patch with the training pictures. At 16 pixels a digit is lost on
leaves and on middle grey, which MNIST-M has too: such patches are left out here.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
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
STRIPS = 10
"""Upright strips that a photograph is cut into; whole strips are held out, so that both parts see all of the scene."""
RECIPE_SEED = 20150528
"""Fixed: the embedded data is one data set, whatever the run's seed."""
DOMAINS = ("digits_m", "digits_street")

Masks = Float[np.ndarray, "N H W"]
Photo = UInt8[np.ndarray, "_ _ 3"]
Pictures = UInt8[np.ndarray, "N H W 3"]


def embedded_digits(held_out: bool) -> tuple[Pictures, Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return (images, labels, domains) of the training part or of the held-out part."""
    rng = np.random.default_rng([RECIPE_SEED, int(held_out)])
    digits, labels = split_digits(held_out)
    which = np.tile(np.arange(len(digits)), HELD_OUT_VARIANTS if held_out else VARIANTS)
    enlarged = enlarge(digits)
    masks_m, masks_street = draw(enlarged, which, rng), draw(enlarged, which, rng)
    neighbours = [masks_m[rng.permutation(len(which))] for _ in ("left", "right")]
    pictures = [render_m(masks_m, photographs(held_out), rng), render_street(masks_street, neighbours, rng)]
    domains = np.repeat(np.arange(len(DOMAINS), dtype=np.int32), len(which))
    return np.concatenate(pictures), np.tile(labels[which], len(DOMAINS)), domains


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
    return digits.images[indices].astype(np.float32) / 16, digits.target[indices].astype(np.int32)


def photographs(held_out: bool) -> list[Photo]:
    """Return the strips of both photographs that belong to one part: every fifth one is held out."""
    strips = [strip for photo in load_sample_images().images for strip in np.array_split(photo, STRIPS, axis=1)]
    every = round(1 / HELD_OUT)
    return [strip for number, strip in enumerate(strips) if (number % every == every // 2) == held_out]


def enlarge(digits: Masks) -> Float[np.ndarray, "N h w"]:
    """Return the digits four times as large with a blank margin; cubic, so that the holes of a 6 or 8 stay open."""
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    return np.clip(ndimage.zoom(padded, (1, 4, 4), order=3), 0, 1)


def draw(digits: Masks, which: Int[np.ndarray, "M"], rng: np.random.Generator) -> Float[np.ndarray, "M h w"]:
    """Draw the chosen enlarged digits at SIZE with a random slant, size, turn and shift; ink stays in [0, 1]."""
    n, side = len(which), digits.shape[1]

    def each(values: Float[np.ndarray, "M"]) -> Float[np.ndarray, "M 1 1"]:
        return values.astype(np.float32)[:, None, None]

    angle, slant = rng.normal(0, 0.08, n), rng.normal(0, 0.08, n)
    scale = each(side / SIZE * rng.uniform(0.75, 0.95, n))
    across = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    y = across[None, :, None] - each(rng.uniform(-1, 1, n))
    x = across[None, None, :] - each(rng.uniform(-1, 1, n))
    down = scale * (each(np.cos(angle)) * y + each(np.sin(angle)) * x) + (side - 1) / 2
    right = scale * (each(np.cos(angle)) * x + each(slant - np.sin(angle)) * y) + (side - 1) / 2
    number = np.broadcast_to(which.astype(np.float32)[:, None, None], down.shape)
    return ndimage.map_coordinates(digits, [number, down, right], order=1)


def render_m(masks: Masks, photos: list[Photo], rng: np.random.Generator) -> Pictures:
    """Blend digits into photographs as MNIST-M does, on patches that leave the digit legible."""
    crops = np.empty((0, SIZE, SIZE, 3), np.uint8)
    while len(crops) < len(masks):
        drawn = random_crops(photos, len(masks), SIZE, rng)
        crops = np.concatenate([crops, drawn[inverts_visibly(drawn)]])
    return blend(crops[: len(masks)], masks > 0.48)


def inverts_visibly(crops: Pictures) -> Bool[np.ndarray, "N"]:
    """Tell which patches differ from their inverse by more than 50 and by more than 2.5 times their own spread."""
    pixels = crops.reshape(len(crops), -1, 3).astype(np.float32)
    contrast = np.sqrt(np.mean((255 - 2 * pixels.mean(1)) ** 2, -1))
    spread = np.sqrt(np.mean(pixels.var(1), -1))
    return contrast > np.maximum(50, 2.5 * spread)


def render_street(masks: Masks, neighbours: list[Masks], rng: np.random.Generator) -> Pictures:
    """Paint digits and the edges of their left and right neighbours in one colour on a ground of another."""
    n = len(masks)
    ground, ink = contrasting_colours(n, rng)
    ink_mask = masks.copy()
    for mask, left in zip(neighbours, (True, False)):
        distance = np.where(rng.random(n) < 0.6, rng.integers(11, 14, n), SIZE)
        for offset in range(11, 14):
            rows, kept = distance == offset, SIZE - offset
            here, there = (slice(kept), slice(offset, None)) if left else (slice(offset, None), slice(kept))
            ink_mask[rows, :, here] = np.maximum(ink_mask[rows, :, here], mask[rows, :, there])
    strength = np.clip((ink_mask[..., None] - 0.27) / 0.4, 0, 1)
    picture = ground[:, None, None, :] + (ink - ground)[:, None, None, :] * strength
    slope = rng.normal(0, 12, (n, 2, 1, 1)).astype(np.float32)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    picture += (slope[:, 0] * ramp[None, :, None] + slope[:, 1] * ramp[None, None, :])[..., None]
    blur = rng.uniform(0, 0.2, n).astype(np.float32)[:, None, None, None]
    for axis in (1, 2):
        edges = ndimage.convolve1d(picture, [1.0, 0.0, 1.0], axis=axis, mode="nearest")
        picture = (1 - 2 * blur) * picture + blur * edges
    noise = rng.standard_normal(picture.shape, np.float32)
    picture += noise * rng.uniform(1, 6, n).astype(np.float32)[:, None, None, None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def contrasting_colours(
    number: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, "N 3"]]:
    """Return two colours in 0..255 a picture, of luma (Rec. 601) at least 80 apart."""
    first, second = rng.uniform(20, 235, (2, number, 3)).astype(np.float32)
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    while (close := np.abs((first - second) @ luma) < 80).any():
        first[close], second[close] = rng.uniform(20, 235, (2, close.sum(), 3))
    return first, second
