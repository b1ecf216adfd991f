"""From models, pictures and prompts to answers: what `jaxdiff.zeroshot` does before it reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxdiff.errors import InputError
from jaxdiff.io.cache import cache_folder
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.io.prompts import expand_templates, fill, read_descriptions
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.runs import Figures
from jaxdiff.processes import is_leader, leader_first
from jaxdiff.recipes.classify import Answers, answer, answer_logits, class_weights, figures_of
from jaxdiff.recipes.clip_features import Encoder, encode_prompts, load_encoder, share_images
from jaxdiff.recipes.contrastive import TRAIN_STEPS, tiny_digits_folder
from jaxdiff.recipes.prompt_weights import (
    Weighting,
    autoclip_weights,
    cosines_of,
    inner_products,
    pictures_at_once,
    weighted_logits,
    zpe_weights,
)

TINY_DIGITS = "tiny-digits"


@dataclass(frozen=True)
class Prompts:
    """What stands for each class.

    Attributes:
      by_class: texts of every class.
      templates: what made them of the class names, in the order of the texts; none where a file describes the classes.
      weighting: how the texts of a class are weighted.
    """

    by_class: Sequence[Sequence[str]]
    templates: tuple[str, ...]
    weighting: Weighting = "equal"

    @property
    def flat(self) -> list[str]:
        """The texts, class after class."""
        return [text for texts in self.by_class for text in texts]


class Result(NamedTuple):
    """What one model makes of all pictures.

    Attributes:
      name: of the model, as given.
      answers: for the pictures that could be read.
      kept: numbers of those pictures.
      skipped: for each of the others, why.
      figures: under plain names.
      by_template: top-1 accuracy with each template alone; empty unless asked for.
      weights: of each template, the mean over pictures; empty where they are equal.
      params_hash: SHA-256 of the parameters.
    """

    name: str
    answers: Answers
    kept: Int[np.ndarray, "N"]
    skipped: tuple[str, ...]
    figures: Figures
    by_template: dict[str, float]
    weights: dict[str, float]
    params_hash: str


def make_prompts(
    class_names: Sequence[str], templates: Sequence[str], descriptions: Path | None, weighting: Weighting = "equal"
) -> Prompts:
    """Return the prompts of every class, from templates or, where given, from a file of descriptions.

    Raises:
      InputError: a template without `{}`, or descriptions that do not fit the classes.
    """
    if descriptions is not None:
        return Prompts(read_descriptions(descriptions, class_names), ())
    expanded = expand_templates(templates)
    return Prompts(fill(expanded, class_names), expanded, weighting)


def prepare_encoder(name: str, revision: str | None, dtype: str, tiny_steps: int | None, mesh: Mesh) -> Encoder:
    """Read a model; `tiny-digits` is trained first where it is not kept yet.

    Raises:
      InputError: files are missing, damaged or another model's, or the hub cannot be reached.
    """
    try:
        return load_encoder(place_of(name, tiny_steps, mesh), revision, dtype, mesh)._replace(name=name)
    except InputError as error:
        raise InputError(f"--model {error}") from error


def place_of(name: str, tiny_steps: int | None, mesh: Mesh) -> str:
    """Return where a model is read from: its name, or for `tiny-digits` its folder, trained now if it is not kept yet.

    Of several processes all must call it.
    """
    if name != TINY_DIGITS:
        return name
    num_steps = TRAIN_STEPS if tiny_steps is None else tiny_steps
    return str(leader_first(lambda: tiny_digits_folder(cache_folder(), num_steps, mesh)))


def classify(
    encoder: Encoder,
    images: LabelledImages,
    prompts: Prompts,
    compare_templates: bool,
    truncate: bool,
    batch_size: int,
    seed: int,
    folder: Path,
) -> Result | None:
    """Encode prompts and pictures once and answer for every picture.

    Args:
      encoder: on this process's own devices.
      images: pictures.
      prompts: of every class.
      compare_templates: whether each template is also tried alone.
      truncate: whether prompts that are too long are cut instead of refused.
      batch_size: pictures at once.
      seed: of the bootstrap.
      folder: takes the pictures' features, batch by batch.

    Returns:
      The result to process 0, None to the others, which only encode their share of the pictures.

    Raises:
      InputError: a prompt is too long, or no picture can be read.
    """
    counts = [len(texts) for texts in prompts.by_class]
    # First, because it may refuse one.
    embeds = encode_prompts(encoder, prompts.flat, truncate, cache_folder() / "prompts") if is_leader() else None
    features = share_images(encoder, images, batch_size, folder)
    if features is None or embeds is None:
        return None
    labels = images.labels[features.kept]
    scale = float(encoder.model.params["logit_scale"])
    answers = answer(features.embeds, class_weights(embeds, counts), scale, labels)
    if not math.isfinite(float(answers.probabilities.sum())):
        raise InputError(f"--model {encoder.name}: gives probabilities that are not finite; use --dtype float32")
    figures: Figures = {}
    weights: dict[str, float] = {}
    by_template: dict[str, float] = {}
    if prompts.weighting != "equal":
        figures["top1_equal_weights"] = float(answers.correct.mean())
        grid = embeds.reshape(len(counts), len(prompts.templates), -1)
        answers, found = answer_weighted(prompts.weighting, features.embeds, grid, scale, labels)
        weights = dict(zip(prompts.templates, found.tolist()))
    if compare_templates:
        grid = embeds.reshape(len(counts), len(prompts.templates), -1)
        for number, template in enumerate(prompts.templates):
            alone = answer(features.embeds, grid[:, number], scale, labels)
            by_template[template] = float(alone.correct.mean())
    figures = figures_of(answers, len(counts), seed) | figures
    figures |= {
        "skipped": len(features.skipped),
        "prompts": len(embeds),
    }
    if features.timed:
        figures["images_per_second"] = features.timed / features.seconds
    params_hash = tree_hash(encoder.model.params)
    return Result(encoder.name, answers, features.kept, features.skipped, figures, by_template, weights, params_hash)


def answer_weighted(
    weighting: Weighting,
    image_embeds: Float[np.ndarray, "N F"],
    grid: Float[np.ndarray, "K P F"],
    scale: float,
    labels: Int[np.ndarray, "N"],
) -> tuple[Answers, Float[np.ndarray, "P"]]:
    """Answer with weighted prompts; return also the weights, their mean over pictures where each has its own.

    Args:
      weighting: how the weights are found.
      image_embeds: of length 1.
      grid: embeddings of the prompts by class and template, of length 1.
      scale: natural logarithm of what cosines are multiplied by.
      labels: true class of each picture.
    """
    products, step = inner_products(grid), pictures_at_once(grid)
    shared = zpe_weights(image_embeds, grid, scale) if weighting == "zpe" else None
    total = np.zeros(grid.shape[1])

    def logits_of(part: slice) -> Float[np.ndarray, "n K"]:
        cosines = cosines_of(image_embeds[part], grid)
        weights = autoclip_weights(cosines) if shared is None else np.repeat(shared[None], len(cosines), axis=0)
        total[:] += weights.sum(axis=0, dtype=np.float64)
        return weighted_logits(cosines, products, weights, scale)

    answers = answer_logits(logits_of, labels, step)
    return answers, total / len(labels)
