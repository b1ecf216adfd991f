"""How like their concepts the pictures along the way are, to CLIP, and when this has stopped rising.

    (1)  score = mean over words of the mean of 100 cos(picture that a text with the word gave, picture of the concept)

It is the image score of the course's grader. It rises early and stays (arXiv 2302.04841), long before the loss says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.recipes.clip_features import Encoder, encode_images, load_encoder
from jaxdiff.recipes.learned_words import words_said

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]
AT_ONCE = 8


def make_image_score(
    model: str,
    words: Sequence[str],
    originals: Sequence[Any],
    prompts: Sequence[str],
    learned: Mapping[str, Any],
    mesh: Mesh,
) -> Callable[[Pictures], float]:
    """Return equation (1) as a function of pictures, as many of each prompt, prompt by prompt.

    Args:
      model: folder or Hugging Face name of a CLIP.
      words: that are learned.
      originals: the pictures of each.
      prompts: that pictures are drawn from.
      learned: all words that the tokenizer was given, by which it is found what a prompt says, with their vectors.
      mesh: devices.

    Raises:
      InputError: the model cannot be read, or no prompt has one of the words.
    """
    said = [words_said(prompt, learned) for prompt in prompts]
    of_word = [[number for number, found in enumerate(said) if word in found] for word in words]
    for word, found in zip(words, of_word):
        if not found:
            raise InputError(f"--score-model: none of --sample-prompts has the word {word}, which is to be scored")
    encoder = load_encoder(model, None, jnp.float32, mesh)
    wanted = [embed(encoder, list(found)) for found in originals]

    def score(pictures: Pictures) -> float:
        drawn = embed(encoder, pictures).reshape(len(prompts), -1, wanted[0].shape[1])
        each = [100 * np.mean(np.concatenate(drawn[numbers]) @ found.T) for numbers, found in zip(of_word, wanted)]
        return float(np.mean(each))

    return score


def embed(encoder: Encoder, pictures: Pictures) -> Float[np.ndarray, "_ F"]:
    """Return the embeddings of pictures, of length 1."""
    names = [str(number) for number in range(len(pictures))]
    return encode_images(encoder, LabelledImages(names, np.zeros(len(names), int), ("",), pictures), AT_ONCE).embeds


def has_stopped_rising(scores: Sequence[float], patience: int) -> bool:
    """Return whether none of the last `patience` scores is above all those before them."""
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])
