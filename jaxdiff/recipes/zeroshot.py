"""From models, pictures and prompts to answers: what `jaxdiff.zeroshot` does before it reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxdiff.errors import InputError
from jaxdiff.io.cache import cache_folder
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.io.prompts import expand_templates, fill, read_descriptions
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.runs import Figures
from jaxdiff.recipes.classify import Answers, answer, class_weights, figures_of
from jaxdiff.recipes.clip_features import Encoder, encode_images, encode_prompts, load_encoder
from jaxdiff.recipes.contrastive import tiny_digits_folder

TINY_DIGITS = "tiny-digits"


@dataclass(frozen=True)
class Prompts:
    """What stands for each class.

    Attributes:
      by_class: texts of every class.
      templates: what made them of the class names, in the order of the texts; none where a file describes the classes.
    """

    by_class: Sequence[Sequence[str]]
    templates: tuple[str, ...]


class Result(NamedTuple):
    """What one model makes of all pictures.

    Attributes:
      name: of the model, as given.
      answers: for the pictures that could be read.
      kept: numbers of those pictures.
      skipped: for each of the others, why.
      figures: under plain names.
      by_template: top-1 accuracy with each template alone; empty unless asked for.
      params_hash: SHA-256 of the parameters.
    """

    name: str
    answers: Answers
    kept: Int[np.ndarray, "N"]
    skipped: tuple[str, ...]
    figures: Figures
    by_template: dict[str, float]
    params_hash: str


def make_prompts(class_names: Sequence[str], templates: Sequence[str], descriptions: Path | None) -> Prompts:
    """Return the prompts of every class, from templates or, where given, from a file of descriptions.

    Raises:
      InputError: a template without `{}`, or descriptions that do not fit the classes.
    """
    if descriptions is not None:
        return Prompts(read_descriptions(descriptions, class_names), ())
    expanded = expand_templates(templates)
    return Prompts(fill(expanded, class_names), expanded)


def prepare_encoder(name: str, revision: str | None, dtype: str, tiny_steps: int, mesh: Mesh) -> Encoder:
    """Read a model; `tiny-digits` is trained first where it is not kept yet.

    Raises:
      InputError: files are missing, damaged or another model's, or the hub cannot be reached.
    """
    if name != TINY_DIGITS:
        try:
            return load_encoder(name, revision, dtype, mesh)
        except InputError as error:
            raise InputError(f"--model {error}") from error
    folder = tiny_digits_folder(cache_folder(), tiny_steps, mesh)
    return load_encoder(str(folder), None, dtype, mesh)._replace(name=name)


def classify(
    encoder: Encoder,
    images: LabelledImages,
    prompts: Prompts,
    compare_templates: bool,
    truncate: bool,
    batch_size: int,
    seed: int,
) -> Result:
    """Encode prompts and pictures once and answer for every picture.

    Raises:
      InputError: a prompt is too long, or no picture can be read.
    """
    counts = [len(texts) for texts in prompts.by_class]
    flat = [text for texts in prompts.by_class for text in texts]
    embeds = encode_prompts(encoder, flat, truncate, cache_folder() / "prompts")
    features = encode_images(encoder, images, batch_size)
    labels = images.labels[features.kept]
    scale = float(encoder.model.params["logit_scale"])
    answers = answer(features.embeds, class_weights(embeds, counts), scale, labels)
    if not math.isfinite(float(answers.probabilities.sum())):
        raise InputError(f"--model {encoder.name}: gives probabilities that are not finite; use --dtype float32")
    by_template: dict[str, float] = {}
    if compare_templates:
        grid = embeds.reshape(len(counts), len(prompts.templates), -1)
        for number, template in enumerate(prompts.templates):
            alone = answer(features.embeds, grid[:, number], scale, labels)
            by_template[template] = float(alone.correct.mean())
    figures = figures_of(answers, len(counts), seed)
    figures |= {
        "skipped": len(features.skipped),
        "images_per_second": len(images.names) / features.seconds,
        "prompts": len(flat),
    }
    params_hash = tree_hash(encoder.model.params)
    return Result(encoder.name, answers, features.kept, features.skipped, figures, by_template, params_hash)
