"""Test-time embedding adjustment: learned words that leave room for the rest of a prompt (TEA, arXiv 2506.22685).

    (1)  v <- beta |c| v / |v|,   c <- beta |c| c / |c|
    (2)  v <- slerp(v, c; alpha)

v is a vector of a learned word and c that of its class. Training lets v grow and turn away from c without bounds, until
it drowns what else a prompt says; (1) and (2) take some of that back, and nothing is trained. It is always the
embedding of the token that is adjusted, not what the text encoder makes of it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdiff.diffusion.interpolation import slerp
from jaxdiff.errors import InputError
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.recipes.learned_words import TABLE, check_widths, get_leaf
from jaxdiff.recipes.stable_diffusion import Params


def adjust_vector(v: Float[np.ndarray, "D"], c: Float[np.ndarray, "D"], alpha: float, beta: float) -> np.ndarray:
    """Return equation (2).

    Args:
      v: of the learned word.
      c: of its class.
      alpha: share of the angle between them, 0 for v's direction and 1 for c's.
      beta: norm of the result in norms of c.
    """
    norm = beta * np.linalg.norm(c)
    learned, own = (jnp.asarray(norm * end / np.linalg.norm(end), jnp.float32) for end in (v, c))
    return np.asarray(slerp(learned, own, jnp.full(1, alpha))[0])


def adjust_words(
    learned: Learned, adjust: Sequence[str], alpha: float, beta: float, params: Params, tokenizer: CLIPTokenizer
) -> Learned:
    """Return learned words, those adjusted that are asked for.

    Args:
      learned: by word, its vectors.
      adjust: WORD:CLASS of each, the class in one token of the model's own.
      alpha: as in `adjust_vector`.
      beta: the same.
      params: of the model.
      tokenizer: of the model.

    Raises:
      InputError: a word was not learned, was learned with another model or is zero, or a class is not one token.
    """
    table = np.asarray(get_leaf(params, TABLE), np.float32)
    if adjust:
        check_widths(learned, table.shape[1])
    adjusted = dict(learned)
    for text in adjust:
        word, name = text.rsplit(":", 1)
        if word not in learned:
            raise InputError(
                f"--adjust {text}: {word} is no word of --embeddings or --adapters"
                + (f", which have {', '.join(learned)}" if learned else ", of which none was given")
            )
        ids = tokenizer([name]).input_ids[0][1:-1]
        if len(ids) != 1:
            pieces = " + ".join(repr(tokenizer.name_of(int(number))) for number in ids) or "none"
            raise InputError(f"--adjust {text}: {name!r} is not one token, but {pieces}: choose a class of one token")
        if not (learned[word].any(axis=1).all() and table[ids[0]].any()):
            raise InputError(f"--adjust {text}: a vector of the word or of its class is zero, so it has no direction")
        adjusted[word] = np.stack([adjust_vector(v, table[ids[0]], alpha, beta) for v in learned[word]])
    return adjusted
