"""The batches that words are learned from.

(1)  loss of the concepts' pictures + prior_weight loss of class pictures    (arXiv 2208.12242, equation 2)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.models.autoencoder import LatentNormal
from jaxdiff.recipes.learned_words import spell_out
from jaxdiff.recipes.textual_inversion import InversionBatch


class Source(NamedTuple):
    """What the places of a batch are filled from.

    Attributes:
      texts: that speak of the pictures.
      latents: of the pictures.
      masks: of the pictures, (N, h, w); None where all of each picture counts.
    """

    texts: Sequence[str]
    latents: LatentNormal
    masks: Float[np.ndarray, "N h w"] | None = None


def make_batches(
    concepts: Sequence[Source],
    tokenizer: CLIPTokenizer,
    learned: Learned,
    batch_size: int,
    seed: int,
    priors: Sequence[Source] = (),
    prior_weight: float = 1.0,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], InversionBatch]:
    """Return batch k as a pure function of (seed, k): concept, picture and text of each place are drawn evenly.

    Args:
      concepts: what to learn.
      tokenizer: which knows the words.
      learned: their rows, however many.
      batch_size: pictures of a batch, an even number where there are priors.
      seed: of the draws.
      priors: class pictures, which every second place is filled from, as equation (1) has it.
      prior_weight: of equation (1).
      process_index: which equal slice of each batch is returned.
      process_count: number of slices.
    """
    length, sources = tokenizer.context_length, [*concepts, *priors]
    remedy = "give the word fewer --vectors-per-token"
    ids_of = [
        tokenizer([spell_out(text, learned) for text in s.texts], length=length, remedy=remedy).input_ids
        for s in sources
    ]
    masked = any(source.masks is not None for source in sources)
    # Twice each, because both halves are means of their own.
    weight = np.tile(np.array([2, 2 * prior_weight], np.float32), batch_size // 2) if priors else None

    part = batch_size // process_count
    own = slice(process_index * part, (process_index + 1) * part)

    def batch_at(step: int) -> InversionBatch:
        rng = np.random.default_rng([seed, step])
        chosen = rng.integers(len(concepts), size=batch_size)
        if priors:
            chosen[1::2] = len(concepts) + rng.integers(len(priors), size=batch_size // 2)
        places = [rng.integers(len(sources[number].latents.mean)) for number in chosen]
        ids = np.stack([ids_of[number][rng.integers(len(ids_of[number]))] for number in chosen])
        drawn = [(sources[number], place) for number, place in zip(chosen, places)]
        mean, log_variance = (
            np.stack([np.asarray(getattr(source.latents, part))[place] for source, place in drawn])
            for part in ("mean", "log_variance")
        )
        everything = np.ones(mean.shape[1:3], np.float32)
        masks = [everything if source.masks is None else source.masks[place] for source, place in drawn]
        whole = InversionBatch(ids, mean, log_variance, weight, np.stack(masks) if masked else None)
        return jax.tree.map(lambda leaf: leaf[own], whole)

    return batch_at
