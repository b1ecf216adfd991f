"""What words are learned from: pictures of the concepts and of their classes, their masks and their texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxdiff.io.concept_pictures import (
    Concept,
    ConceptPictures,
    parse_masks,
    parse_prior,
    read_concept_pictures,
    read_views,
    texts_of,
)
from jaxdiff.io.provenance import tree_hash
from jaxdiff.recipes.inversion_batches import Source
from jaxdiff.recipes.text_to_image import TextToImage
from jaxdiff.recipes.textual_inversion import encode_pictures
from jaxdiff.textual_inversion_settings import InversionSettings


class InversionData(NamedTuple):
    """What the batches are drawn from.

    Attributes:
      concepts: to learn.
      priors: their classes.
      originals: the whole pictures of each concept.
      about: what the data check of a run's folder keeps, a hash of all that is learned from among it.
    """

    concepts: list[Source]
    priors: list[Source]
    originals: list[UInt8[np.ndarray, "_ H W 3"]]
    about: dict[str, Any]


def read_data(concepts: Sequence[Concept], training: InversionSettings, drawing: TextToImage) -> InversionData:
    """Read all pictures and encode them; say how many there are.

    The hash covers the weights too, so that a run cannot go on with others from a folder of the same name.

    Raises:
      InputError: pictures, masks or texts are missing or cannot be read.
    """
    size = drawing.size[0]
    masks = parse_masks(training.mask, concepts)
    classes = [parse_prior(text) for text in training.prior]
    texts = texts_of(concepts, training.templates)
    views = [
        read_concept_pictures(concept, size, training.crops, training.seed, masks.get(concept.word))
        for concept in concepts
    ]
    for concept, found in zip(concepts, views):
        kind = "a style" if concept.kind == "style" else "an object"
        print(f"{concept.word}: {found.whole} pictures, learned as {kind} from {concept.initializer!r}")
    others = [read_views("--prior", folder, size) for folder, _ in classes]
    for (_, text), found in zip(classes, others):
        print(f"{text!r}: {found.whole} pictures of a class, which is to stay as it is")
    everything = [*zip(texts, views), *(([text], found) for (_, text), found in zip(classes, others))]
    sources = [_to_source(speaks, found, training.flip, drawing) for speaks, found in everything]
    hashed: list[dict[str, Any]] = [
        {"texts": np.array(speaks), "pixels": found.pixels, "masks": {} if found.masks is None else found.masks}
        for speaks, found in everything
    ]
    about = {
        "pictures": {concept.word: found.whole for concept, found in zip(concepts, views)},
        "texts": {concept.word: len(speaks) for concept, speaks in zip(concepts, texts)},
        "priors": {text: found.whole for (_, text), found in zip(classes, others)},
        "sha256": tree_hash(
            {**{str(i): each for i, each in enumerate(hashed)}, "weights": np.array(drawing.about["sha256"])}
        ),
    }
    originals = [found.pixels[: found.whole] for found in views]
    return InversionData(sources[: len(concepts)], sources[len(concepts) :], originals, about)


def _to_source(texts: Sequence[str], found: ConceptPictures, flip: bool, drawing: TextToImage) -> Source:
    """Return pictures as latents, their masks as large as these."""
    found = found.with_mirror_images() if flip else found
    latents = encode_pictures(drawing.model, drawing.params, found.pixels, drawing.mesh)
    masks = None if found.masks is None else shrink_masks(found.masks, np.asarray(latents.mean).shape[1])
    return Source(texts, latents, masks)


def shrink_masks(masks: Float[np.ndarray, "N H W"], side: int) -> Float[np.ndarray, "N h w"]:
    """Return masks of `side` pixels on a side, each the mean of those that it stands for."""
    factor = masks.shape[1] // side
    return masks.reshape(len(masks), side, factor, side, factor).mean(axis=(2, 4))
