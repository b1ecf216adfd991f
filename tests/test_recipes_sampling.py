"""Sampling: an image is a function of (seed, number, condition) alone, and guidance costs and gives what it promises.

The pictures of the `painter` have a closed form: it sees one clean colour for each pair of conditions, and the last
reverse step ends on the clean image that the guided network sees.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CLASSES, DOMAINS, SHAPE, random_params, tiny_model, tiny_unet

from jaxdiff.diffusion.samplers import image_keys
from jaxdiff.diffusion.timesteps import timestep_spacing
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes.conditional import Condition
from jaxdiff.recipes.sampling import make_sampler, sample_pixels
from jaxdiff.settings import SamplingSettings

N = 11
NUMBERS = np.arange(N, dtype=np.int32)
CONDITION = Condition(NUMBERS % len(CLASSES), NUMBERS % len(DOMAINS))

# One image, many draws


@pytest.fixture(scope="module")
def draw():
    """(devices, batch_size) -> the batches of pixels; DDIM with eta 1, so that every step draws noise too."""
    model = tiny_model(tiny_unet())
    params = random_params(model.init)
    settings = SamplingSettings(num_steps=4, eta=1.0, guidance_scale=2.0)
    samplers = {devices: make_sampler(model, settings, make_mesh(devices)) for devices in (1, 8)}

    def run(devices, batch_size, seed=0, chosen=NUMBERS):
        condition = Condition(*(labels[chosen] for labels in CONDITION))
        return list(sample_pixels(samplers[devices], params, seed, chosen, condition, batch_size, make_mesh(devices)))

    return run


@pytest.fixture(scope="module")
def images(draw):
    return np.concatenate(draw(1, 4))


def assert_same_pixels(first, second):
    """Sums run in another order in another batch; rounding to bytes can turn such a last bit into one level."""
    difference = np.abs(first.astype(int) - second.astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.02


@pytest.mark.parametrize(("devices", "batch_size", "sizes"), [(1, 4, [4, 4, 3]), (1, 16, [11]), (8, 8, [8, 3])])
def test_pixels_do_not_depend_on_batch_size_or_devices_and_the_last_batch_is_cut(
    draw, images, devices, batch_size, sizes
):
    parts = draw(devices, batch_size)
    assert [len(part) for part in parts] == sizes
    assert_same_pixels(np.concatenate(parts), images)
    # The images are far apart, so one in another's place would show.
    flat = images.reshape(N, -1).astype(float)
    distances = np.abs(flat[:, None] - flat[None]).mean(-1)
    assert distances[~np.eye(N, dtype=bool)].min() > 10


def test_an_image_is_found_again_by_its_number(draw, images):
    chosen = np.array([9, 2, 9], np.int32)
    (again,) = draw(1, 4, chosen=chosen)
    assert_same_pixels(again, images[chosen])


def test_another_seed_gives_other_images(draw, images):
    (other,) = draw(1, 4, seed=1, chosen=NUMBERS[:4])
    assert np.abs(other.astype(float) - images[:4]).mean(axis=(1, 2, 3)).min() > 10


# Guidance

# Rows are classes, columns domains; the last of each is "none". Random, so that no combination hides another.
COLOURS = np.random.default_rng(0).uniform(-0.1, 0.1, (len(CLASSES) + 1, len(DOMAINS) + 1))


def painter():
    """Return a network that answers with COLOURS, and the list of batch sizes of all its evaluations."""
    evaluations = []

    class Painter(nn.Module):
        @nn.compact
        def __call__(self, x_t, t, class_labels, domain_labels, train=False):
            batch_size = x_t.shape[0]
            jax.debug.callback(lambda: evaluations.append(batch_size))
            colour = jnp.asarray(COLOURS, jnp.float32)[class_labels, domain_labels]
            return jnp.broadcast_to(colour[:, None, None, None], x_t.shape)

    return Painter(), evaluations


def paint(settings, trajectory=False):
    """Return what the sampler gives for CONDITION, and the batch sizes of all network evaluations."""
    network, evaluations = painter()
    sampler = make_sampler(tiny_model(network, "x_0"), settings, make_mesh(1), trajectory)
    keys = image_keys(jax.random.key(0), jnp.asarray(NUMBERS))
    result = jax.block_until_ready(sampler({}, keys, Condition(*map(jnp.asarray, CONDITION))))
    jax.effects_barrier()
    return result, evaluations


def colours_of(classes, domains):
    return COLOURS[classes, domains][:, None, None, None] * np.ones(SHAPE)


NOTHING = colours_of(np.full(N, len(CLASSES)), np.full(N, len(DOMAINS)))
DOMAIN = colours_of(np.full(N, len(CLASSES)), CONDITION.domain_labels)
BOTH = colours_of(*CONDITION)


@pytest.mark.parametrize(
    ("scale", "domain_scale", "branches", "sampler"),
    [
        (2.5, None, 2, "ddim"),
        (2.5, None, 2, "ddpm"),
        (3.0, 1.0, 2, "ddim"),
        (0.0, 1.0, 1, "ddim"),
        (3.0, 1.5, 3, "ddim"),
        (1.0, 3.0, 3, "ddpm"),
    ],
)
def test_guidance_gives_its_closed_form_at_its_price(scale, domain_scale, branches, sampler):
    settings = SamplingSettings(sampler=sampler, num_steps=3, guidance_scale=scale, domain_guidance_scale=domain_scale)
    images, evaluations = paint(settings)
    # InstructPix2Pix's own order of terms (arXiv 2211.09800, eq. 3), the domain first.
    s = scale if domain_scale is None else domain_scale
    expected = NOTHING + s * (DOMAIN - NOTHING) + scale * (BOTH - DOMAIN)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert evaluations == [branches * N] * 3


@pytest.mark.parametrize(("scale", "expected"), [(0.0, NOTHING), (1.0, BOTH)])
def test_guidance_is_exact_at_both_ends_and_costs_one_evaluation_a_step(scale, expected):
    images, evaluations = paint(SamplingSettings(num_steps=2, guidance_scale=scale))
    np.testing.assert_array_equal(images, expected.astype(np.float32))
    assert evaluations == [N, N]


def test_an_interval_guides_inside_and_is_the_cheaper_conditional_prediction_outside():
    low, high, num_steps, scale = 0.3, 2.0, 10, 2.5
    settings = SamplingSettings(num_steps=num_steps, guidance_scale=scale, guidance_interval=(low, high))
    (_, trajectory), evaluations = paint(settings, trajectory=True)
    schedule = tiny_model(painter()[0]).schedule
    levels = np.sqrt(1 / np.asarray(schedule.alphas_cumprod, np.float64) - 1)
    inside = [low <= levels[t] <= high for t in timestep_spacing("trailing", num_steps, schedule)]
    assert 2 <= sum(inside) <= num_steps - 4
    assert not inside[0]
    assert not inside[-1]
    for x_0, guided in zip(trajectory.x_0, inside, strict=True):
        np.testing.assert_allclose(x_0, NOTHING + scale * (BOTH - NOTHING) if guided else BOTH, atol=1e-6)
    assert evaluations == [2 * N if guided else N for guided in inside]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_clean_image_is_clipped_to_the_range_of_pixels_after_guidance(scale):
    class Loud(nn.Module):
        """Sees pixels of 0.9, unasked and unclassed of 0.5: guidance 4 makes 0.9 + 3 * 0.4 of them."""

        @nn.compact
        def __call__(self, x_t, t, class_labels, domain_labels, train=False):
            seen = jnp.where(class_labels == 0, 3.0 if scale == 1.0 else 0.9, 0.5)
            return jnp.broadcast_to(seen[:, None, None, None], x_t.shape)

    settings = SamplingSettings(num_steps=2, guidance_scale=scale)
    sampler = make_sampler(tiny_model(Loud(), "x_0"), settings, make_mesh(1), trajectory=True)
    keys = image_keys(jax.random.key(0), jnp.arange(1))
    images, trajectory = sampler({}, keys, Condition(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)))
    np.testing.assert_array_equal(trajectory.x_0, np.ones_like(trajectory.x_0))
    np.testing.assert_array_equal(images, np.ones_like(images))
