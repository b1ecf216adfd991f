"""The objective: conditions dropped image by image at the stated rates, every timestep met, a mean over images."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_ATOL
from tiny_model import CLASSES, DOMAINS, SHAPE, T, random_params, tiny_model, tiny_unet

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Batch
from jaxdiff.recipes.conditional import Condition
from jaxdiff.recipes.objective import drop_conditions, make_diffusion_loss
from jaxdiff.settings import DiffusionSettings, TrainingSettings

pytestmark = pytest.mark.usefixtures("quick_commands")
NULL = (len(CLASSES), len(DOMAINS))
NO_DROPOUT = TrainingSettings(class_dropout=0.0, domain_dropout=0.0, joint_dropout=0.0)
N = 20_000


def keys_of(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


def labels_of(number):
    i = jnp.arange(number)
    return Condition(i % NULL[0], i % NULL[1])


def batch_of(number, shape=SHAPE):
    images = np.random.default_rng(0).integers(0, 256, (number, *shape), dtype=np.uint8)
    return Batch(images, *(np.asarray(labels) for labels in labels_of(number)))


def settings_of(prediction_type, **fields):
    return DiffusionSettings(num_train_timesteps=T, prediction_type=prediction_type, **fields)


def assert_rate(dropped, rate):
    """Accept four standard errors of a binomial share: one false alarm in 16,000."""
    assert abs(float(np.mean(dropped)) - rate) <= 4 * np.sqrt(rate * (1 - rate) / np.size(dropped))


# Condition dropout


@pytest.mark.parametrize(
    ("class_rate", "domain_rate", "joint_rate"),
    [(0.1, 0.0, 0.1), (0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.2, 0.3, 0.4), (0.0, 0.0, 0.0)],
)
def test_class_alone_domain_alone_and_both_are_dropped_at_their_rates(class_rate, domain_rate, joint_rate):
    training = TrainingSettings(class_dropout=class_rate, domain_dropout=domain_rate, joint_dropout=joint_rate)
    given = labels_of(N)
    dropped = drop_conditions(keys_of(N), given, training, NULL)
    no_class, no_domain = (np.asarray(labels) == null for labels, null in zip(dropped, NULL))
    assert_rate(no_class & ~no_domain, class_rate)
    assert_rate(~no_class & no_domain, domain_rate)
    assert_rate(no_class & no_domain, joint_rate)
    # What is not dropped stays as it was.
    for before, after, gone in zip(given, dropped, (no_class, no_domain)):
        np.testing.assert_array_equal(after, np.where(gone, np.asarray(after), before))


def test_images_lose_their_conditions_independently():
    training = TrainingSettings(class_dropout=0.3, domain_dropout=0.0, joint_dropout=0.2)
    gone = np.asarray(drop_conditions(keys_of(2 * N), labels_of(2 * N), training, NULL).class_labels) == NULL[0]
    first, second = gone[::2], gone[1::2]
    assert_rate(first & second, 0.5**2)
    assert_rate(first & ~second, 0.5**2)


def test_rates_that_exceed_one_together_are_refused():
    with pytest.raises(InputError, match=r"--class-dropout.* add up to at most 1, got 1\.2"):
        TrainingSettings(class_dropout=0.4, domain_dropout=0.4, joint_dropout=0.4)


def test_the_key_decides_and_not_the_place_in_the_batch():
    training = TrainingSettings(class_dropout=0.3, domain_dropout=0.3, joint_dropout=0.2)
    keys, labels = keys_of(64), labels_of(64)
    together = drop_conditions(keys, labels, training, NULL)
    order = np.random.default_rng(0).permutation(64)
    shuffled = drop_conditions(keys[order], Condition(*(part[order] for part in labels)), training, NULL)
    alone = drop_conditions(keys[9:10], Condition(*(part[9:10] for part in labels)), training, NULL)
    for whole, moved, single in zip(together, shuffled, alone):
        np.testing.assert_array_equal(moved, whole[order])
        np.testing.assert_array_equal(single, whole[9:10])


# Loss


class Answer(nn.Module):
    """Answer with a function of what the network is given, for losses with a closed form."""

    function: str

    @nn.compact
    def __call__(self, x_t, t, class_labels, domain_labels, train=False):
        values = {
            "zero": jnp.zeros_like(t),
            "late": t >= T - 5,
            "no_class": class_labels == NULL[0],
            "no_domain": domain_labels == NULL[1],
        }
        return jnp.broadcast_to(values[self.function].astype(jnp.float32)[:, None, None, None], x_t.shape)


def loss_of(function, diffusion, training, batch):
    loss_fn = make_diffusion_loss(tiny_model(Answer(function)), diffusion, training)
    return float(jax.jit(loss_fn)({}, batch, keys_of(len(batch.images))))


def test_an_answer_of_zero_costs_the_mean_square_of_the_target():
    batch = batch_of(400)
    pixels = batch.images.astype(np.float64) / 127.5 - 1
    assert loss_of("zero", settings_of("x_0"), NO_DROPOUT, batch) == pytest.approx(np.mean(pixels**2), rel=1e-5)
    # The mean square of n standard normal numbers has variance 2/n.
    assert abs(loss_of("zero", settings_of("eps"), NO_DROPOUT, batch) - 1) < 4 * np.sqrt(2 / pixels.size)


def white(number):
    """Pictures whose x_0 is 1 everywhere: the x_0 loss is then the share of images that are answered with 0."""
    return Batch(np.full((number, 1, 1, 1), 255, np.uint8), *(np.asarray(labels) for labels in labels_of(number)))


def test_timesteps_are_drawn_evenly_up_to_the_last():
    share = loss_of("late", settings_of("x_0"), NO_DROPOUT, white(N))
    rate = 1 - 5 / T
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / N)


@pytest.mark.parametrize(("function", "lost"), [("no_class", 0.2 + 0.1), ("no_domain", 0.4 + 0.1)])
def test_the_network_is_shown_the_dropped_conditions(function, lost):
    training = TrainingSettings(class_dropout=0.2, domain_dropout=0.4, joint_dropout=0.1)
    share = loss_of(function, settings_of("x_0"), training, white(N))
    assert abs(share - (1 - lost)) < 4 * np.sqrt(lost * (1 - lost) / N)


def test_min_snr_weights_reach_the_loss():
    # With gamma above every signal-to-noise ratio, min-SNR on x_0 is the plain loss of eps (arXiv 2303.09556).
    batch = white(N)
    eps = settings_of("eps", loss_weighting="min_snr", min_snr_gamma=1e9)
    assert loss_of("zero", eps, NO_DROPOUT, batch) == pytest.approx(
        loss_of("zero", settings_of("eps"), NO_DROPOUT, batch), rel=1e-5
    )
    # With gamma below all of them it is a constant weight on x_0: here gamma times a mean square of 1.
    x_0 = settings_of("x_0", loss_weighting="min_snr", min_snr_gamma=1e-9)
    assert loss_of("zero", x_0, NO_DROPOUT, batch) == pytest.approx(1e-9, rel=1e-3)


@pytest.fixture(scope="module")
def unet():
    """A tiny UNet, its parameters, and its jitted loss."""
    model = tiny_model(tiny_unet())
    return model, random_params(model.init), jax.jit(make_diffusion_loss(model, settings_of("v"), DROPOUT))


DROPOUT = TrainingSettings(class_dropout=0.3, domain_dropout=0.3, joint_dropout=0.3)


def test_the_loss_of_a_batch_is_the_mean_over_its_images(unet):
    _, params, loss_fn = unet
    batch, keys = batch_of(8), keys_of(8)
    alone = [float(loss_fn(params, Batch(*(leaf[i : i + 1] for leaf in batch)), keys[i : i + 1])) for i in range(8)]
    assert np.ptp(alone) > 0.01
    assert float(loss_fn(params, batch, keys)) == pytest.approx(np.mean(alone), abs=FLOAT32_ATOL)


def test_bfloat16_is_close_to_float32_and_parameters_stay_float32(unet):
    model, params, loss_fn = unet
    low = dataclasses.replace(model, network=tiny_unet(jnp.bfloat16))
    low_loss_fn = make_diffusion_loss(low, settings_of("v"), DROPOUT)
    batch, keys = batch_of(8), keys_of(8)
    made = jax.eval_shape(low.init, jax.random.key(0))
    value_and_gradient = jax.eval_shape(jax.value_and_grad(low_loss_fn), params, batch, keys)
    assert {leaf.dtype for leaf in jax.tree.leaves((made, value_and_gradient))} == {jnp.dtype("float32")}
    value, full = float(jax.jit(low_loss_fn)(params, batch, keys)), float(loss_fn(params, batch, keys))
    # bfloat16 keeps 8 bits, half a unit of which is 0.2 %; some ten layers and a square add up to a few times that.
    assert 0 < abs(value - full) / full < 0.02
