"""Groups of pictures, one a prompt, with what they are held to; their scores by one CLIP."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.errors import InputError
from jaxdiff.io.concept_pictures import MAX_PIXELS
from jaxdiff.io.course_task import COUNTED, read_task
from jaxdiff.io.images import read_image
from jaxdiff.io.labelled_images import LabelledImages, Pixels, pictures, single_pictures
from jaxdiff.io.runs import Figures
from jaxdiff.recipes.clip_features import Encoder, encode_prompts, share_images
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
from jaxdiff.recipes.learned_words import longest_of

ANYTHING = "a photo"
NAMING = "a photo of {}"


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt.

    Attributes:
      name: in tables and in results.json.
      files: in order of name.
      references: pictures of the concept; may be none.
      prompt: text that they shall show; empty for none.
      spoken: the text that they were drawn from, with the learned word; empty where `prompt` is that.
      stripped: the same without the learned word; empty where that is not known.
      baseline: least image and text score of the best five; None where nothing is asked.
      words: concepts whose presence is asked for.
    """

    name: str
    files: tuple[Path, ...]
    references: tuple[Path, ...]
    prompt: str
    spoken: str = ""
    stripped: str = ""
    baseline: tuple[float, float] | None = None
    words: tuple[str, ...] = ()

    @property
    def texts(self) -> dict[str, str]:
        """What the pictures are compared with, by the name of the figure; a text may be empty."""
        return {"clip_t": self.prompt, "clip_t_with_word": self.spoken, "clip_t_stripped": self.stripped}


class Graded(NamedTuple):
    """The scores of one group.

    Attributes:
      image: of each picture; empty without references.
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


def task_groups(task: Path, generated: Path, references: Path, count: int) -> list[Group]:
    """Return one group for each prompt of the course's task.

    Args:
      task: the JSON file.
      generated: holds {key}/{prompt number}/.
      references: holds {key}/.
      count: pictures that each prompt must have.

    Raises:
      InputError: the file is not such a task, a folder is missing, or holds another number of pictures.
    """
    groups = []
    for concept in read_task(task):
        originals = list_counted(references / concept.key, "--references")
        for number, (prompt, plain, baseline) in enumerate(
            zip(concept.prompts, concept.plain_prompts, concept.baselines)
        ):
            folder = generated / concept.key / str(number)
            files = list_counted(folder, "--generated")
            if len(files) != count:
                raise InputError(f"--generated {folder}: {len(files)} pictures, must be {count}; --count says how many")
            stripped = without([concept.token], prompt)
            groups.append(Group(f"{concept.key}.{number}", files, originals, plain, prompt, stripped, baseline))
    return groups


def without(tokens: Sequence[str], prompt: str) -> str:
    """Return the prompt with the learned words left out."""
    return re.sub(r"\s+", " ", longest_of(tokens).sub(" ", prompt)).strip()


def list_pictures(folder: Path, flag: str) -> tuple[Path, ...]:
    """Return the pictures of a folder in order of name, without our own grids and sheets of them.

    Raises:
      InputError: no such folder, or no pictures in it.
    """
    return _list(folder, flag, single_pictures)


def list_counted(folder: Path, flag: str) -> tuple[Path, ...]:
    """Return all that the course's grader counts in a folder, likewise."""
    return _list(folder, flag, lambda folder: pictures(folder, COUNTED))


def _list(folder: Path, flag: str, list_files: Callable[[Path], list[Path]]) -> tuple[Path, ...]:
    if not folder.expanduser().is_dir():
        raise InputError(f"{flag} {folder}: no such folder")
    found = tuple(list_files(folder.expanduser()))
    if not found:
        raise InputError(f"{flag} {folder}: holds no pictures")
    return found


def read_as_grader(path: Path) -> Pixels:
    """Decode a picture as the course's grader does, who does not turn it; raise OSError as `read_image` does."""
    return read_image(path, MAX_PIXELS)


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
    files = sorted({file for group in groups for file in (*group.files, *group.references)})
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
    image = image_scores(drawn, originals) if len(originals) else np.zeros(0)
    text = text_scores(drawn, by_text[group.prompt], scale) if group.prompt else np.zeros(0)
    figures: Figures = {"pictures": len(drawn), "references": len(originals)}

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
        if min(len(drawn), len(originals)) > 1:
            for name, interval in zip(("cmmd", "cmmd_with_self_pairs"), cmmd_intervals(drawn, originals, seed)):
                note(name, interval)
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
