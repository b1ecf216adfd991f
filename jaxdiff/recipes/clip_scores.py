"""How well pictures show a concept and a text, by CLIP's embeddings, all of length 1.

    (1)  image score  mean over references r of 100 cos(x, r)                       (the course's grader)
    (2)  text score   exp(logit_scale) cos(x, t)                                    (the same)
    (3)  of one prompt's pictures, the five with the largest image score + 2.5 text score count, by their means
    (4)  CLIP-I  mean of cos(x, r),  CLIP-T  mean of cos(x, t)                      (arXiv 2208.12242, section 5.1)
    (5)  CLIPScore  2.5 max(cos(x, t), 0)                                           (arXiv 2104.08718, equation 1)
    (6)  CMMD  1000 (k_xx + k_yy - 2 k_xy),  k(a, b) = exp(-|a - b|^2 / (2 10^2))   (arXiv 2401.09603, section 4)

Papers disagree on the scale of (4) and on whether the text still holds the learned word, so both are given. In (6) the
means of k_xx and k_yy leave out pairs of a picture with itself, as the paper's estimator does; its published code keeps
them. Where each of several concepts has references of its own, (1) and the first of (4) are the means of those by each,
so that every concept counts alike, and (6) is taken by each alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

BEST = 5
TEXT_WEIGHT = 2.5
RESAMPLES = 2000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS_AT_ONCE = 1024

Embeds = Float[np.ndarray, "_ F"]
Scores = Float[np.ndarray, "N"]


class Interval(NamedTuple):
    """A mean and its 95 % interval, which too few pictures do not have."""

    mean: float
    low: float | None
    high: float | None


def image_scores(pictures: Embeds, references: Embeds) -> Float[np.ndarray, "_"]:
    """Return equation (1) for every picture."""
    return 100 * (pictures.astype(np.float64) @ references.astype(np.float64).mean(axis=0))


def text_scores(pictures: Embeds, text: Float[np.ndarray, "F"], logit_scale: float) -> Float[np.ndarray, "_"]:
    """Return equation (2) for every picture; `logit_scale` is the natural logarithm of the factor."""
    return np.exp(logit_scale) * (pictures.astype(np.float64) @ text.astype(np.float64))


def best_pictures(image: Scores, text: Scores, number: int = BEST) -> Int[np.ndarray, "_"]:
    """Return the positions of the pictures that count by (3), the best first."""
    return np.argsort(-(image + TEXT_WEIGHT * text), kind="stable")[:number]


def presence_margins(
    pictures: Embeds, word: Float[np.ndarray, "F"], anything: Float[np.ndarray, "F"], logit_scale: float
) -> Float[np.ndarray, "_"]:
    """Return how much better every picture fits a text with a concept's word than the same text without it.

    Above 0, of the two texts CLIP takes the one that names the concept.
    """
    return text_scores(pictures, word, logit_scale) - text_scores(pictures, anything, logit_scale)


def mean_interval(values: Scores, seed: int) -> Interval:
    """Return the mean with its 95 % percentile bootstrap interval (Efron 1979) over pictures."""
    (found,) = _bootstrap(lambda chosen: (values[chosen].mean(),), len(values), seed)
    return found


def best_intervals(image: Scores, text: Scores, seed: int) -> tuple[Interval, Interval]:
    """Return both means of (3) with their intervals over pictures, of which the best are chosen anew each time."""

    def means(chosen: Int[np.ndarray, "N"]) -> tuple[float, float]:
        best = chosen[best_pictures(image[chosen], text[chosen])]
        return image[best].mean(), text[best].mean()

    of_image, of_text = _bootstrap(means, len(image), seed)
    return of_image, of_text


def _bootstrap(
    statistics: Callable[[Int[np.ndarray, "N"]], tuple[float, ...]], number: int, seed: int
) -> list[Interval]:
    """Return statistics of numbered pictures with their percentile bootstrap intervals."""
    whole = statistics(np.arange(number))
    if number < 2:
        return [Interval(float(value), None, None) for value in whole]
    rng = np.random.default_rng(seed)
    drawn = np.array([statistics(rng.integers(0, number, number)) for _ in range(RESAMPLES)])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    return [Interval(*map(float, found)) for found in zip(whole, low, high)]


def cmmd(pictures: Embeds, references: Embeds) -> Float[np.ndarray, "2"]:
    """Return equation (6) without and with pairs of a picture with itself.

    Args:
      pictures: at least two.
      references: at least two.
    """
    return _cmmd(pictures, references, _mean_within(references))


def _cmmd(pictures: Embeds, references: Embeds, within_references: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    between = _kernel_sum(pictures, references) / (len(pictures) * len(references))
    return CMMD_SCALE * (_mean_within(pictures) + within_references - 2 * between)


def _mean_within(a: Embeds) -> Float[np.ndarray, "2"]:
    """Return the mean of k over pairs of `a` of two and over all; a picture is at distance 0 of itself."""
    number, total = len(a), _kernel_sum(a, a)
    return np.array([(total - number) / (number * (number - 1)), total / number**2])


def _kernel_sum(a: Embeds, b: Embeds) -> float:
    """Return the sum of k over all pairs, a block of them at a time."""
    total, b = 0.0, b.astype(np.float64)
    for start in range(0, len(a), ROWS_AT_ONCE):
        # Of vectors of length 1, |a - b|^2 = 2 - 2 a.b.
        distance = 2 - 2 * (a[start : start + ROWS_AT_ONCE].astype(np.float64) @ b.T)
        total += float(np.exp(-distance / (2 * CMMD_SIGMA**2)).sum())
    return total


def cmmd_intervals(pictures: Embeds, references: Embeds, seed: int, resamples: int = 200) -> tuple[Interval, Interval]:
    """Return both of `cmmd` and the 95 % intervals of their values on halves of the pictures, against all references.

    Drawing with replacement would count pictures as their own doubles, which (6) takes for likeness; halves drawn
    without replacement (Politis & Romano 1994) spread as the whole does, scaled by the square root of their share.
    That a half's pairs with itself weigh twice as much moves all halves alike, and so no interval.
    """
    rng = np.random.default_rng(seed)
    within_references = _mean_within(references)
    whole, half = _cmmd(pictures, references, within_references), max(2, len(pictures) // 2)
    if half == len(pictures):
        alone, with_self = (Interval(float(value), None, None) for value in whole)
        return alone, with_self
    drawn = np.array([
        _cmmd(pictures[rng.permutation(len(pictures))[:half]], references, within_references)
        for _ in range(resamples)
    ])  # fmt: skip
    # Of a half drawn without replacement: variance (1/half - 1/all); of the whole: 1/all.
    spread = (drawn - drawn.mean(axis=0)) * np.sqrt(half / (len(pictures) - half))
    low, high = whole + np.percentile(spread, (2.5, 97.5), axis=0)
    alone, with_self = (Interval(*map(float, found)) for found in zip(whole, low, high))
    return alone, with_self
