"""What learning words would take, from configs alone."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.io.images import to_float
from jaxdiff.mesh import round_up
from jaxdiff.recipes.image_score import scoring_program
from jaxdiff.recipes.inversion_parts import choose_optimizer, first_deltas
from jaxdiff.recipes.learned_words import TABLE, get_leaf
from jaxdiff.recipes.memory import Sizes, estimate_memory
from jaxdiff.recipes.text_to_image_model import drawing_programs, read_shapes
from jaxdiff.recipes.textual_inversion import PICTURES_AT_ONCE, InversionBatch, make_inversion_loss
from jaxdiff.recipes.training import create_state, make_train_step
from jaxdiff.text2image_settings import LatentModelSettings
from jaxdiff.textual_inversion_settings import InversionSettings


def estimate_learning(
    words: Sequence[str], settings: LatentModelSettings, training: InversionSettings, mesh: Mesh
) -> Sizes:
    """Return what a device would hold while words are learned and pictures drawn with them.

    Raises:
      InputError: the size does not fit the model.
    """
    model, params = read_shapes(settings)
    size = training.size or model.default_size
    latent_shape = model.latent_shape(size, size)
    text = model.text_encoder.config
    # What the rows are changes no shape, nor does how long the model's words are.
    rows = {word: np.ones((training.vectors_per_token, text.hidden_size), np.float32) for word in words}
    start, _, optimizer, _ = choose_optimizer(training, rows, np.ones((1, text.hidden_size)))
    deltas = first_deltas(params, words, training)
    longer = replace(text, vocab_size=get_leaf(params, TABLE).shape[0] + sum(map(len, rows.values())))
    learning = replace(model, text_encoder=model.text_encoder.clone(config=longer))
    if training.value_learning_rate is not None:
        learning = replace(learning, own_values=((0,),) * len(words))  # which tokens makes no difference
    loss_fn = make_inversion_loss(learning, list(rows), training.loss_weighting)
    latents = jax.ShapeDtypeStruct((training.batch_size, *latent_shape), jnp.float32)
    ids = jax.ShapeDtypeStruct((training.batch_size, text.max_position_embeddings), jnp.int32)

    def step(state, batch, frozen):
        taken = make_train_step(
            loss_fn, optimizer, mesh, training.ema_decay, training.accumulation_steps, frozen=frozen
        )
        return taken(state, batch)

    def encode(vae, pixels):
        return learning.autoencoder.apply({"params": vae}, to_float(pixels), method="encode")

    state = create_state(
        {name: jnp.asarray(leaf) for name, leaf in (start | deltas).items()}, optimizer, jax.random.key(0), mesh
    )
    at_once = round_up(PICTURES_AT_ONCE, mesh)
    pixels = jax.ShapeDtypeStruct((at_once, size, size, 3), jnp.uint8)
    held, scoring = [params], {}
    if training.score_model is not None:
        clip, number, program = scoring_program(training.score_model, mesh)
        held.append(clip)
        scoring = {f"scoring, {number} pictures at once": program}
    return estimate_memory(held, {
        f"learning, {training.batch_size} pictures a step":
            jax.jit(step).lower(state, InversionBatch(ids, latents, latents), params),
        f"encoding, {at_once} pictures at once": jax.jit(encode).lower(params["vae"], pixels),
        **drawing_programs(model, params, training.pictures, mesh),
        **scoring,
    })  # fmt: skip
