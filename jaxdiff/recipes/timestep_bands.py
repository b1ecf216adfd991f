"""The loss of learned words by how noisy the pictures are, on the same draws every time.

The loss of a training step says little: most of it depends on the timestep that was drawn. Here texts, pictures,
timesteps and noise stay the same, so that what changes from step to step is the rows' doing, and low and high noise are
told apart.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.mesh import put_whole
from jaxdiff.recipes.custom_diffusion import Trained
from jaxdiff.recipes.stable_diffusion import Params, StableDiffusion
from jaxdiff.recipes.textual_inversion import InversionBatch, make_inversion_loss
from jaxdiff.recipes.training import image_keys_at

BANDS = 4
CHECKED_PICTURES = 8
"""Pictures in each band, or those of a step, if they are more."""


def band_names(num_train_timesteps: int) -> dict[str, tuple[int, int]]:
    """Return the first timestep of each band and the one after its last, by name."""
    edges = [int(edge) for edge in np.linspace(0, num_train_timesteps, min(BANDS, num_train_timesteps) + 1)]
    return {f"loss_t{low}_{high - 1}": (low, high) for low, high in pairwise(edges)}


def make_check(
    model: StableDiffusion,
    words: Sequence[str],
    frozen: Params,
    batch_at: Callable[[int], InversionBatch],
    finish: Callable[[Trained], Trained],
    mesh: Mesh,
) -> Callable[[Trained], dict[str, jax.Array]]:
    """Return the loss in each band of timesteps, and their mean, as a function of averages of what is learned.

    Args:
      model: from `add_words`.
      words: in the order in which they were added.
      frozen: the model's parameters without the rows.
      batch_at: the whole batch k.
      finish: from averages to what is kept.
      mesh: devices.
    """
    size = len(batch_at(0).mean)
    batches = [
        (put_whole(batch_at(k), mesh), image_keys_at(jax.random.key(0), jnp.int32(k), size))
        for k in range(max(1, CHECKED_PICTURES // size))
    ]
    bands = band_names(model.diffusion.num_train_timesteps)

    @jax.jit
    def loss_in(trained, batch, keys, frozen, low, high):
        return make_inversion_loss(model, words, timesteps=(low, high))(trained, batch, keys, frozen)

    def check(trained: Trained) -> dict[str, jax.Array]:
        trained = finish(trained)
        found = {
            name: jnp.mean(jnp.stack([loss_in(trained, *batch, frozen, *ends) for batch in batches]))
            for name, ends in bands.items()
        }
        return {"validation_loss": jnp.mean(jnp.stack(list(found.values()))), **found}

    return check
