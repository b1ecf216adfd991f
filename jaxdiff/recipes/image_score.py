"""How like their concepts the pictures along the way are, to CLIP, and when this has stopped rising.

    (1)  score = mean over words of the mean of 100 cos(picture that a text with the word gave, picture of the concept)

It is the image score of the course's grader. It rises early and stays (arXiv 2302.04841), long before the loss says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.hub import open_model
from jaxdiff.io.pretrained_files import read_config
from jaxdiff.io.provenance import tree_hash
from jaxdiff.mesh import round_up
from jaxdiff.recipes.clip_features import Encoder, compile_encoder, encoding_program, load_encoder
from jaxdiff.recipes.contrastive import tiny_digits_config
from jaxdiff.recipes.learned_words import words_said
from jaxdiff.recipes.pretrained import FlaxCLIPModel
from jaxdiff.recipes.zeroshot import TINY_DIGITS

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]
AT_ONCE = 8


class ImageScore(NamedTuple):
    """Equation (1).

    Attributes:
      of: function of pictures, as many of each prompt, prompt by prompt; raises InputError if the score is not finite.
      sha256: of the parameters of the CLIP.
    """

    of: Callable[[Pictures], float]
    sha256: str


def prompts_by_word(words: Sequence[str], prompts: Sequence[str], learned: Mapping[str, Any]) -> list[list[int]]:
    """Return for each word the numbers of the prompts that say it; `learned` as in `make_image_score`.

    Raises:
      InputError: none says one of the words.
    """
    said = [words_said(prompt, learned) for prompt in prompts]
    found = [[number for number, in_prompt in enumerate(said) if word in in_prompt] for word in words]
    for word, numbers in zip(words, found):
        if not numbers:
            raise InputError(f"--score-model: none of --sample-prompts has the word {word}, which is to be scored")
    return found


def make_image_score(
    model: str,
    words: Sequence[str],
    originals: Sequence[Any],
    prompts: Sequence[str],
    learned: Mapping[str, Any],
    mesh: Mesh,
) -> ImageScore:
    """Return the score of pictures of these prompts by a CLIP.

    Args:
      model: folder or Hugging Face name of a CLIP, from `place_of`.
      words: that are learned.
      originals: the pictures of each.
      prompts: that pictures are drawn from.
      learned: all words that the tokenizer was given, by which it is found what a prompt says, with their vectors.
      mesh: devices.

    Raises:
      InputError: the model cannot be read, or no prompt has one of the words.
    """
    of_word = prompts_by_word(words, prompts, learned)
    try:
        encoder = load_encoder(model, None, jnp.float32, mesh)
    except InputError as error:
        raise InputError(f"--score-model {error}") from error
    # Once, because to trace a large CLIP again takes longer than all pictures of a score.
    encode = compile_encoder(encoder, round_up(AT_ONCE, mesh))
    wanted = [embed(encoder, encode, list(found)) for found in originals]

    def score(pictures: Pictures) -> float:
        drawn = embed(encoder, encode, pictures).reshape(len(prompts), -1, wanted[0].shape[1])
        each = [100 * np.mean(np.concatenate(drawn[numbers]) @ found.T) for numbers, found in zip(of_word, wanted)]
        if not np.isfinite(each).all():
            raise InputError(f"--score-model {model}: gives numbers that are not finite: try another")
        return float(np.mean(each))

    return ImageScore(score, tree_hash(encoder.model.params))


def embed(encoder: Encoder, encode: Callable[..., Any], pictures: Pictures) -> Float[np.ndarray, "_ F"]:
    """Return the embeddings of pictures, of length 1; `encode` is from `compile_encoder`."""
    step = round_up(AT_ONCE, encoder.mesh)
    cut = [encoder.preprocessor.cut(picture) for picture in pictures]
    parts = [np.stack(cut[start : start + step]) for start in range(0, len(cut), step)]
    return np.concatenate([np.asarray(encode(part)) for part in parts])


def scoring_program(name: str, mesh: Mesh) -> tuple[Any, int, jax.stages.Lowered]:
    """Return the shapes of a CLIP's parameters, how many pictures it takes at once, and its program for them.

    Only the config of the model is read.

    Raises:
      InputError: it cannot be.
    """
    try:
        if name == TINY_DIGITS:
            config = tiny_digits_config()
        else:
            config = FlaxCLIPModel.read_config(read_config(name, open_model(name)))
    except InputError as error:
        raise InputError(f"--score-model {error}") from error
    model = FlaxCLIPModel(config, _do_init=False)
    size, at_once = config.vision_config.image_size, round_up(AT_ONCE, mesh)
    pixels = jax.ShapeDtypeStruct((at_once, size, size, 3), jnp.uint8)
    program = encoding_program(model.module, np.zeros((256, 3), np.float32), mesh)
    return model.params_shape_tree, at_once, program.lower(model.params_shape_tree, pixels)


def has_stopped_rising(scores: Sequence[float], patience: int) -> bool:
    """Return whether none of the last `patience` scores is above all those before them."""
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])
