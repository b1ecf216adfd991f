"""Zero-shot classification: the class whose prompts lie nearest to the picture (arXiv 2103.00020, section 3.1).

(1)  w_k = normalize(mean over the prompts of class k of their embeddings, each of length 1)
(2)  p(k | image) = softmax_k(exp(logit_scale) cos(image, w_k))
(3)  calibration error = sum over bins b of  (n_b / n) |accuracy_b - confidence_b|        (arXiv 1706.04599, eq. 3)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdiff.io.runs import Figures

TOP = 5
BINS = 15
RESAMPLES = 2000

Embeds = Float[np.ndarray, "_ F"]
Probabilities = Float[np.ndarray, "N K"]


class Answers(NamedTuple):
    """What a model says of pictures whose class is known.

    Attributes:
      top: the most probable classes, best first.
      probabilities: of those classes.
      labels: the true classes.
      wanted_probability: of the true class.
    """

    top: Int[np.ndarray, "N T"]
    probabilities: Float[np.ndarray, "N T"]
    labels: Int[np.ndarray, "N"]
    wanted_probability: Float[np.ndarray, "N"]

    @property
    def correct(self) -> Bool[np.ndarray, "N"]:
        """Whether the most probable class is the true one."""
        return self.top[:, 0] == self.labels

    @property
    def among_top(self) -> Bool[np.ndarray, "N"]:
        """Whether the true class is one of the most probable."""
        return (self.top == self.labels[:, None]).any(axis=1)


def class_weights(prompt_embeds: Embeds, prompts_per_class: Sequence[int]) -> Embeds:
    """Return equation (1).

    Args:
      prompt_embeds: of length 1, class after class.
      prompts_per_class: how many of them each class has.
    """
    starts = np.cumsum([0, *prompts_per_class[:-1]])
    # The sum points where the mean does.
    sums = np.add.reduceat(prompt_embeds.astype(np.float64), starts, axis=0)
    return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)


def answer(image_embeds: Embeds, weights: Embeds, logit_scale: float, labels: Int[np.ndarray, "N"]) -> Answers:
    """Return equation (2) for every picture.

    Args:
      image_embeds: of length 1.
      weights: from `class_weights`.
      logit_scale: natural logarithm of what cosines are multiplied by.
      labels: true class of each picture.
    """
    scale = np.exp(np.float32(logit_scale))
    return answer_logits(lambda part: scale * (image_embeds[part] @ weights.T), labels, 4096)


def answer_logits(logits_of: Callable[[slice], Probabilities], labels: Int[np.ndarray, "N"], step: int) -> Answers:
    """Turn logits into probabilities and keep the most probable classes, so that never all lie in memory.

    Args:
      logits_of: logits of a slice of the pictures.
      labels: true class of each picture.
      step: pictures at a time.
    """
    parts = []
    for first in range(0, len(labels), step):
        part = slice(first, first + step)
        logits = logits_of(part)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        wanted = np.take_along_axis(probabilities, labels[part, None], axis=1)[:, 0]
        parts.append((top, np.take_along_axis(probabilities, top, axis=1), wanted))
    top, best, wanted = (np.concatenate(column) for column in zip(*parts))
    return Answers(top, best.astype(np.float32), labels, wanted.astype(np.float32))


def figures_of(answers: Answers, num_classes: int, seed: int) -> Figures:
    """Return accuracies, top-1 with its 95 % interval, mean recall and calibration error, all in [0, 1]."""
    low, high = bootstrap_interval(int(answers.correct.sum()), len(answers.labels), seed)
    return {
        "top1": float(answers.correct.mean()),
        "top1_low": low,
        "top1_high": high,
        "top5": float(answers.among_top.mean()),
        "mean_per_class_recall": float(np.mean(recalls(answers, num_classes))),
        "calibration_error": calibration_error(answers.probabilities[:, 0], answers.correct),
        "mean_confidence": float(answers.probabilities[:, 0].mean()),
        "images": len(answers.labels),
    }


def bootstrap_interval(correct: int, number: int, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of a share.

    Drawing pictures again and counting the correct ones is one draw of a binomial distribution.
    """
    draws = np.random.default_rng(seed).binomial(number, correct / number, RESAMPLES) / number
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def recalls(answers: Answers, num_classes: int) -> Float[np.ndarray, "K"]:
    """Return for each class the share of its pictures that are recognised; NaN without pictures."""
    totals = np.bincount(answers.labels, minlength=num_classes)
    right = np.bincount(answers.labels[answers.correct], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return right / totals


def calibration_error(confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"]) -> float:
    """Return equation (3) over bins of equal width."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, correct.astype(float) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(correct))


def confused_pairs(counts: Int[np.ndarray, "K K"], number: int) -> list[tuple[int, int, int]]:
    """Return (true class, class taken for it, pictures) of the most frequent errors."""
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:number]
    pairs = [divmod(int(place), errors.shape[1]) for place in order]
    return [(row, column, int(errors[row, column])) for row, column in pairs if errors[row, column]]


def choose_cases(answers: Answers, number: int, seed: int) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    """Return the positions of some successes and some failures, drawn by the seed, not picked."""
    rng = np.random.default_rng(seed)
    right, wrong = np.flatnonzero(answers.correct), np.flatnonzero(~answers.correct)
    return (
        np.sort(rng.choice(right, min(number, len(right)), replace=False)),
        np.sort(rng.choice(wrong, min(number, len(wrong)), replace=False)),
    )
