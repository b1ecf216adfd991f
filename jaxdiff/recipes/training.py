"""Training as pure functions: a state, one jitted step, and a generator that runs it.

    (1)  ema <- d ema + (1 - d) params,   d = min(ema_decay, (1 + step) / (10 + step))
    (2)  key of image i at step k:  fold_in(fold_in(key, k), i)

By (2), and because a batch is a pure function of the step, a resumed run repeats an uninterrupted one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxdiff.mesh import put_batch, replicated, split_large
from jaxdiff.shapes import ImageKeys, PRNGKey

LossFn = Callable[..., jax.Array]
"""(params, batch, one key for each image) -> mean loss; last of all the frozen parameters, where there are any."""


class Stream(IntEnum):
    """What a run draws random numbers for; each has a key of its own."""

    INITIAL = 0
    TRAINING = 1
    SAMPLES = 2
    JUDGE = 3


def stream_key(seed: int, stream: Stream) -> PRNGKey:
    """Return the key of one stream of a run's seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold to go on exactly."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    key: Any


class StepResult(NamedTuple):
    """What `fit` yields: the number of finished steps, the state after them, and the last step's figures."""

    step: int
    state: TrainState
    metrics: dict[str, jax.Array]


def create_state(params: Any, optimizer: optax.GradientTransformation, key: PRNGKey, mesh: Mesh) -> TrainState:
    """Return the state at step 0, placed on the mesh by `split_large`."""

    def build(params, key):
        return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params), key)

    shardings = split_large(jax.eval_shape(build, params, key), mesh)
    return jax.jit(build, out_shardings=shardings)(params, key)


def make_optimizer(
    learning_rate: float, warmup_steps: int, num_steps: int, weight_decay: float, clip_norm: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return AdamW (arXiv 1711.05101) with global-norm clipping, and its warm-up + cosine learning rate.

    Args:
      learning_rate: peak, per step.
      warmup_steps: steps of linear rise from 0 to the peak.
      num_steps: all steps; the rate reaches 0 at the last one.
      weight_decay: decoupled decay of kernels and embeddings; biases and norms are left alone.
      clip_norm: largest global norm of the gradient.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup_steps, num_steps - 1), max(num_steps, 1)
    )

    def decayed(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw), schedule


@dataclass(frozen=True)
class TrainStep:
    """The jitted `(state, batch) -> (state, metrics)`; the state's buffers are donated.

    Attributes:
      compiled: takes state, batch and the rest.
      others: the rest, which nothing changes.
    """

    compiled: jax.stages.Wrapped
    others: tuple[Any, ...]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take one step."""
        return self.compiled(state, batch, *self.others)

    def bytes_on_device(self, state: TrainState, batch: Any) -> int:
        """Return what a device holds during a step; it is compiled for that, which the first step need not do again."""
        found: Any = self.compiled.lower(state, batch, *self.others).compile().memory_analysis()
        kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return kept + found.temp_size_in_bytes


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema_decay: float,
    accumulation_steps: int = 1,
    frozen: Any = None,
) -> TrainStep:
    """Return the step of a training.

    Args:
      loss_fn: mean loss over the images of a batch.
      optimizer: any optax transformation.
      mesh: devices that share the batch.
      ema_decay: limit of the parameter average's decay, in [0, 1).
      accumulation_steps: equal parts that the batch is worked through in, to save memory.
      frozen: parameters that the loss needs and nothing changes; None for none.
    """
    others = () if frozen is None else (frozen,)

    def mean_gradients(params, batch, keys, *others):
        if accumulation_steps == 1:
            return jax.value_and_grad(loss_fn)(params, batch, keys, *others)
        # Part j takes images j, j+n, j+2n, ..., so that every device keeps the images it already holds.
        parts = jax.tree.map(
            lambda leaf: jnp.swapaxes(leaf.reshape(-1, accumulation_steps, *leaf.shape[1:]), 0, 1),
            (batch, keys),
        )

        def add_part(total, part):
            result = jax.value_and_grad(loss_fn)(params, *part, *others)
            return jax.tree.map(jnp.add, total, result), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add_part, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation_steps, total)

    def train_step(state: TrainState, batch, *others):
        keys = image_keys_at(state.key, state.step, jax.tree.leaves(batch)[0].shape[0])
        loss, gradients = mean_gradients(state.params, batch, keys, *others)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(lambda ema, p: decay * ema + (1 - decay) * p, state.ema_params, params)
        new_state = TrainState(state.step + 1, params, ema_params, opt_state, state.key)
        # Where the old state lay, whose buffers it takes over.
        placed = jax.lax.with_sharding_constraint(new_state, split_large(new_state, mesh))
        return placed, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}

    return TrainStep(jax.jit(train_step, donate_argnums=0, out_shardings=(None, replicated(mesh))), others)


def image_keys_at(key: PRNGKey, step: jax.Array, batch_size: int) -> ImageKeys:
    """Return equation (2) for all images of one batch."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(jnp.arange(batch_size))


def find_not_finite(state: Any) -> str | None:
    """Return the name of a leaf that holds NaN or infinity, or None where all numbers are finite."""
    numbers = [
        (path, _is_finite(leaf))
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, finite in numbers if not finite)
    return next(names, None)


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    # Leaf by leaf, because one program over all leaves of a large model takes seconds to compile.
    return jnp.all(jnp.isfinite(leaf))


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batch_at: Callable[[int], Any],
    num_steps: int,
    mesh: Mesh,
) -> Iterator[StepResult]:
    """Train from the state's own step to `num_steps`, yielding after every step.

    The next batch is gathered while the device works, and nothing here waits for the device: read the metrics
    of a result one step late to keep it busy. A yielded state is only good until the next one is asked for.
    """
    step = int(state.step)
    batch = put_batch(batch_at(step), mesh) if step < num_steps else None
    while step < num_steps:
        state, metrics = train_step(state, batch)
        step += 1
        if step < num_steps:
            batch = put_batch(batch_at(step), mesh)
        yield StepResult(step, state, metrics)
