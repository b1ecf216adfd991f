"""The training objective of a conditional diffusion model, with its conditions dropped at random.

Classifier-free guidance (arXiv 2207.12598) needs one network that knows every combination it will be asked for.
Each image draws one uniform number, whose place decides: both are dropped with probability `joint_dropout`, the class
alone with `class_dropout`, the domain alone with `domain_dropout`, as in arXiv 2211.09800, section 3.2.1. A dropped
condition becomes its null token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.loss import diffusion_loss, q_sample
from jaxdiff.io.datasets import Batch
from jaxdiff.io.images import to_float
from jaxdiff.recipes.conditional import Condition, ConditionalModel
from jaxdiff.recipes.training import LossFn
from jaxdiff.settings import DiffusionSettings, TrainingSettings
from jaxdiff.shapes import ImageKeys


def drop_conditions(
    keys: ImageKeys, condition: Condition, training: TrainingSettings, null: tuple[int, int]
) -> Condition:
    """Replace conditions by their null tokens, image by image."""
    draws = jax.vmap(jax.random.uniform)(keys)
    both = draws < training.joint_dropout
    no_class = draws < training.joint_dropout + training.class_dropout
    no_domain = both | (~no_class & (draws < training.any_dropout))
    return Condition(
        jnp.where(no_class, null[0], condition.class_labels),
        jnp.where(no_domain, null[1], condition.domain_labels),
    )


def make_diffusion_loss(
    model: ConditionalModel, diffusion: DiffusionSettings, training: TrainingSettings, train: bool = True
) -> LossFn:
    """Return the loss of a batch of uint8 images.

    Args:
      model: network, schedule and null tokens.
      diffusion: what is predicted and how it is weighted.
      training: for the condition dropout.
      train: whether the network applies its own dropout.
    """
    schedule = model.schedule

    def loss_fn(params: Any, batch: Batch, keys: ImageKeys) -> jax.Array:
        x_0 = to_float(batch.images)
        key_t, key_eps, key_drop, key_net = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_train_timesteps))(key_t)
        eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(key_eps)
        condition = drop_conditions(key_drop, Condition(batch.labels, batch.domains), training, model.null)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        x_t = q_sample(x_0, eps, alpha_t, sigma_t)
        output = model.apply(params, x_t, t, condition, train=train, rngs={"dropout": key_net[0]})
        losses = diffusion_loss(
            output,
            x_0,
            eps,
            alpha_t,
            sigma_t,
            schedule.logsnr(t),
            prediction_type=diffusion.prediction_type,
            weighting=diffusion.loss_weighting,
            logsnr_slope=schedule.logsnr_slope(t),
            gamma=5.0 if diffusion.min_snr_gamma is None else diffusion.min_snr_gamma,
        )
        return jnp.mean(losses)

    return loss_fn
