"""The scores of groups of pictures by one CLIP."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.errors import InputError
from jaxdiff.io.labelled_images import LabelledImages, Pixels
from jaxdiff.io.runs import Figures
from jaxdiff.recipes.clip_features import Encoder, encode_prompts, share_images
from jaxdiff.recipes.clip_groups import Group
from jaxdiff.recipes.clip_scores import (
    Embeds,
    Interval,
    best_intervals,
    best_pictures,
    cmmd_intervals,
    image_scores,
    mean_interval,
    presence_margins,
    text_scores,
)

ANYTHING = "a photo"
NAMING = "a photo of {}"


class Graded(NamedTuple):
    """The scores of one group.

    Attributes:
      image: of each picture; empty without references. Where there are only those of several concepts, the mean of
        the scores by each.
      text: of each picture; empty without a prompt.
      best: positions of the pictures that count; empty without both.
      passed: whether the best reach the baseline; None where there is none.
      figures: under plain names.
    """

    group: Group
    image: Float[np.ndarray, "_"]
    text: Float[np.ndarray, "_"]
    best: Int[np.ndarray, "_"]
    passed: bool | None
    figures: Figures


def grade(
    encoder: Encoder,
    groups: Sequence[Group],
    batch_size: int,
    seed: int,
    folder: Path,
    read: Callable[[Path], Pixels],
) -> list[Graded] | None:
    """Return the scores of every group; each picture and each text is encoded once.

    Args:
      encoder: on this process's own devices.
      groups: of pictures.
      batch_size: pictures encoded at once.
      seed: of the bootstrap.
      folder: for the features of pictures, of which several processes make a share each.
      read: decodes a picture, or raises OSError.

    Returns:
      The scores to process 0, None to the others.

    Raises:
      InputError: a picture cannot be read, or a text is too long.
    """
    files = sorted({
        file for group in groups for part in (group.files, *group.all_references.values()) for file in part
    })  # fmt: skip
    images = LabelledImages(list(map(str, files)), np.zeros(len(files), np.int32), ("",), files, read)
    features = share_images(encoder, images, batch_size, folder)
    if features is None:
        return None
    if features.skipped:
        raise InputError(f"{len(features.skipped)} pictures cannot be read; the first is {features.skipped[0]}")
    place = {file: number for number, file in enumerate(files)}
    texts = {ANYTHING, *(NAMING.format(word) for group in groups for word in group.words)}
    texts |= {text for group in groups for text in group.texts.values() if text}
    ordered = sorted(texts)
    remedy = "score by another text"
    by_text = dict(zip(ordered, encode_prompts(encoder, ordered, truncate=False, remedy=remedy)))
    scale = float(encoder.model.params["logit_scale"])

    def embeds(chosen: Sequence[Path]) -> Embeds:
        return features.embeds[[place[file] for file in chosen]]

    return [_grade(group, embeds, by_text, scale, seed) for group in groups]


def _grade(
    group: Group,
    embeds: Callable[[Sequence[Path]], Embeds],
    by_text: dict[str, Float[np.ndarray, "F"]],
    scale: float,
    seed: int,
) -> Graded:
    drawn, originals = embeds(group.files), embeds(group.references)
    concepts = {word: embeds(files) for word, files in group.concepts.items()}
    by_concept = {word: image_scores(drawn, own) for word, own in concepts.items()}
    image = image_scores(drawn, originals) if len(originals) else np.zeros(0)
    if concepts and not len(originals):
        image = np.mean(list(by_concept.values()), axis=0)
    text = text_scores(drawn, by_text[group.prompt], scale) if group.prompt else np.zeros(0)
    references = sum(map(len, group.all_references.values()))
    figures: Figures = {"pictures": len(drawn), "references": references}

    def note(name: str, interval: Interval) -> None:
        figures[name] = interval.mean
        if interval.low is not None and interval.high is not None:
            figures.update({f"{name}_low": interval.low, f"{name}_high": interval.high})

    def add(name: str, values: Float[np.ndarray, "_"]) -> None:
        note(name, mean_interval(values, seed))

    best, passed = np.zeros(0, np.int64), None
    if len(image) and len(text):
        best = best_pictures(image, text)
        of_image, of_text = best_intervals(image, text, seed)
        note("best.image_score", of_image)
        note("best.text_score", of_text)
        if group.baseline is not None:
            passed = all(found.mean >= least for found, least in zip((of_image, of_text), group.baseline))
            figures["passed"] = int(passed)
    if len(image):
        add("image_score", image)
        add("clip_i", image / 100)
        add("clip_i_times_2.5", 2.5 * np.maximum(image / 100, 0))
    for word, own in {"": originals, **concepts}.items():
        ending = f".{word}" if word else ""
        if word:
            add(f"image_score{ending}", by_concept[word])
            add(f"clip_i{ending}", by_concept[word] / 100)
        if min(len(drawn), len(own)) > 1:
            for name, interval in zip(("cmmd", "cmmd_with_self_pairs"), cmmd_intervals(drawn, own, seed)):
                note(f"{name}{ending}", interval)
    if len(text):
        add("text_score", text)
    for name, prompt in group.texts.items():
        if prompt:
            cosine = text_scores(drawn, by_text[prompt], 0.0)
            add(name, cosine)
            add(f"{name}_times_2.5", 2.5 * np.maximum(cosine, 0))
    anything = by_text[ANYTHING]
    margins = {word: presence_margins(drawn, by_text[NAMING.format(word)], anything, scale) for word in group.words}
    for word, margin in margins.items():
        add(f"presence_margin.{word}", margin)
        add(f"present.{word}", (margin > 0).astype(np.float64))
    if len(margins) > 1:
        add("all_present", np.all([margin > 0 for margin in margins.values()], axis=0).astype(np.float64))
    return Graded(group, image, text, best, passed, figures)
