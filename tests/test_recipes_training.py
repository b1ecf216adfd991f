"""Training: the same step on any number of devices, in any number of parts, resumed or not; and a loop that stops well.

The toy problem is a table of vectors, a matrix, a scale and a bias, which PyTorch can be given too.
"""

import functools
import os
import re
import signal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scale_job
import torch
from conftest import FLOAT32_ATOL, FLOAT64_RTOL
from diffusers.optimization import get_cosine_schedule_with_warmup
from tiny_model import SHAPE, T, TinyNetwork, random_params, tiny_model, tiny_unet

from jaxdiff.errors import InputError, InterruptedRun
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.datasets import Dataset, batches
from jaxdiff.io.metrics import METRICS, MetricsLog, read_lines
from jaxdiff.mesh import LARGE, make_mesh, put_batch
from jaxdiff.recipes.loop import TrainingLoop
from jaxdiff.recipes.objective import make_diffusion_loss
from jaxdiff.recipes.training import create_state, fit, make_optimizer, make_train_step
from jaxdiff.settings import DiffusionSettings, TrainingSettings

pytestmark = pytest.mark.usefixtures("quick_commands")


class ToyBatch(NamedTuple):
    x: np.ndarray
    row: np.ndarray
    target: np.ndarray


def toy_params():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (4, 3), "embedding": (5, 4), "bias": (3,), "scale": (3,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def toy_batch(step, size=16):
    rng = np.random.default_rng(step)
    x, target = (rng.standard_normal((size, n)).astype(np.float32) for n in (4, 3))
    return ToyBatch(x, rng.integers(0, 5, size), target)


def toy_output(params, batch):
    hidden = (params["embedding"][batch.row] * batch.x) @ params["kernel"]
    return hidden * params["scale"][None] + params["bias"][None]


def toy_loss(params, batch, keys):
    return jnp.mean((toy_output(params, batch) - batch.target) ** 2)


def noisy_toy_loss(params, batch, keys):
    """The target of each image is drawn from its own key, as the noise of a diffusion loss is."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return jnp.mean((toy_output(params, batch) - noise) ** 2)


def values_of(tree):
    """Copy a tree to NumPy, random keys as their data, before its buffers are donated."""
    leaves = jax.tree.leaves(tree)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.array(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key)]


def assert_same_bits(first, second):
    for a, b in zip(values_of(first), values_of(second), strict=True):
        np.testing.assert_array_equal(a, b)


# Optimizer


@pytest.mark.parametrize("devices", [1, 8])
def test_adamw_with_clipping_warm_up_and_cosine_as_in_torch(devices):
    num_steps, warmup, rate, decay, clip = 12, 3, 0.1, 0.2, 1.5
    mesh = make_mesh(devices)
    optimizer, learning_rate = make_optimizer(rate, warmup, num_steps, decay, clip)
    step = make_train_step(toy_loss, optimizer, mesh, 0.9)
    state = create_state(toy_params(), optimizer, jax.random.key(0), mesh)

    theirs = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in toy_params().items()}
    groups = [
        {"params": [theirs["kernel"], theirs["embedding"]], "weight_decay": decay},
        {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-8)
    schedule = get_cosine_schedule_with_warmup(adamw, warmup, num_steps)

    norms = []
    for result in fit(state, step, toy_batch, num_steps, mesh):
        batch = ToyBatch(*map(torch.from_numpy, toy_batch(result.step - 1)))
        loss = torch.mean((toy_output(theirs, batch) - batch.target) ** 2)
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)))
        assert float(learning_rate(result.step - 1)) == pytest.approx(schedule.get_last_lr()[0], rel=1e-5)
        adamw.step()
        schedule.step()
        assert float(result.metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(result.metrics["gradient_norm"]) == pytest.approx(norms[-1], rel=1e-3)
        for name, value in theirs.items():
            np.testing.assert_allclose(result.state.params[name], value.detach(), atol=1e-4, err_msg=name)
    # Both sides of the clip were met.
    assert min(norms) < clip < max(norms)


def test_only_kernels_and_embeddings_of_a_unet_decay():
    params = jax.tree.map(jnp.ones_like, random_params(tiny_model(tiny_unet()).init))
    rate, decay = 0.1, 0.3
    optimizer, _ = make_optimizer(rate, 0, 10, decay, 1.0)

    def update(params):
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    seen = set()
    # With a gradient of 0 all that is left of AdamW is -rate * decay * parameter.
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(update)(params)):
        name = path[-1].key
        expected = -rate * decay if name in ("kernel", "embedding") else 0.0
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=str(path))
        seen.add(name)
    assert seen == {"kernel", "embedding", "bias", "scale"}


@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (10, 10), (100, 10), (0, 1), (5, 1)])
def test_short_runs_have_a_usable_learning_rate(warmup, num_steps):
    _, learning_rate = make_optimizer(0.1, warmup, num_steps, 0.0, 1.0)
    rates = [float(learning_rate(step)) for step in range(num_steps + 1)]
    # The peak is reached however short the run is, and 0 when it is over.
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


# One step


def step_of(loss_fn, devices, accumulation_steps, optimizer):
    mesh = make_mesh(devices)
    state = create_state(toy_params(), optimizer, jax.random.key(3), mesh)
    step = make_train_step(loss_fn, optimizer, mesh, 0.9, accumulation_steps)
    return step(state, put_batch(toy_batch(0, 32), mesh))


# Plain gradient descent, because Adam divides a vanishing gradient by its own size and so turns the last bit of a sum
# into a whole step.
SGD = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope="module")
def whole_batch():
    return step_of(noisy_toy_loss, 1, 1, SGD)


@pytest.mark.parametrize(("devices", "accumulation_steps"), [(1, 4), (8, 1), (8, 2), (8, 4)])
def test_a_batch_in_parts_equals_one_big_batch(whole_batch, devices, accumulation_steps):
    whole, whole_metrics = whole_batch
    parts, parts_metrics = step_of(noisy_toy_loss, devices, accumulation_steps, SGD)
    chex.assert_trees_all_close(jax.device_get(parts.params), whole.params, atol=FLOAT32_ATOL)
    chex.assert_trees_all_close(parts_metrics, whole_metrics, rtol=1e-5)
    # The images are not all alike, so a part that was left out or taken twice would show.
    alone = [toy_loss(toy_params(), ToyBatch(*(leaf[i::4] for leaf in toy_batch(0, 32))), None) for i in range(4)]
    assert np.ptp(alone) > 0.1


def test_every_image_has_its_own_noise_and_every_step_new_noise():
    drawn = []

    def loss_fn(params, batch, keys):
        noise = jax.vmap(jax.random.uniform)(keys)
        jax.debug.callback(lambda values: drawn.append(np.array(values)), noise)
        return jnp.sum(params["bias"]) * jnp.mean(noise)

    mesh = make_mesh(1)
    state = create_state({"bias": jnp.ones(3)}, SGD, jax.random.key(0), mesh)
    list(fit(state, make_train_step(loss_fn, SGD, mesh, 0.9), lambda step: np.zeros((4, 1), np.float32), 3, mesh))
    jax.effects_barrier()
    assert len(np.unique(np.concatenate(drawn))) == 3 * 4


def test_the_old_state_is_donated_and_what_it_was_made_of_is_not():
    mesh = make_mesh(8)
    optimizer, _ = make_optimizer(0.1, 1, 10, 0.1, 1.0)
    params, key = jax.tree.map(jnp.asarray, toy_params()), jax.random.key(0)
    state = create_state(params, optimizer, key, mesh)
    new, _ = make_train_step(toy_loss, optimizer, mesh, 0.9)(state, put_batch(toy_batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, params, key)))


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_average_follows_its_equation(ema_decay):
    mesh = make_mesh(1)
    optimizer, _ = make_optimizer(0.1, 0, 20, 0.1, 1.0)
    state = create_state(toy_params(), optimizer, jax.random.key(0), mesh)
    average = {name: value.astype(np.float64) for name, value in toy_params().items()}
    decays = []
    for result in fit(state, make_train_step(toy_loss, optimizer, mesh, ema_decay), toy_batch, 15, mesh):
        k = result.step - 1
        decays.append(min(ema_decay, (1 + k) / (10 + k)))
        for name, value in result.state.params.items():
            average[name] = decays[-1] * average[name] + (1 - decays[-1]) * np.asarray(value, np.float64)
            np.testing.assert_allclose(
                result.state.ema_params[name], average[name], rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL, err_msg=name
            )
    # Warm-up of the decay and its limit were both met.
    assert ema_decay == 0 or decays[0] < decays[1] < decays[-1] == ema_decay


# A whole network, with dropout


@pytest.fixture(scope="module")
def network_run():
    """A network with dropout on random images: the state at step 0, the batches, and a step for each mesh."""
    model = tiny_model(TinyNetwork())
    images = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8)
    number = np.arange(20, dtype=np.int32)
    data = Dataset(images, number % 3, number % 2, model.class_names, model.domain_names)
    loss_fn = make_diffusion_loss(model, DiffusionSettings(num_train_timesteps=T), TrainingSettings())
    params = random_params(model.init)
    steps = {devices: make_train_step(loss_fn, SGD, make_mesh(devices), 0.5) for devices in (1, 8)}

    def start(devices, key=7):
        return create_state(params, SGD, jax.random.key(key), make_mesh(devices))

    return start, batches(data, 0, 8), steps


def test_one_and_eight_devices_take_the_same_step(network_run):
    start, batch_at, steps = network_run
    (one, one_metrics), (eight, eight_metrics) = (
        step(start(devices), put_batch(batch_at(0), make_mesh(devices))) for devices, step in steps.items()
    )
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(eight))
    # Means over the batch are taken in another order: a share of each device first.
    chex.assert_trees_all_close(eight_metrics, one_metrics, rtol=1e-5)
    for name in ("params", "ema_params", "opt_state"):
        chex.assert_trees_all_close(jax.device_get(getattr(eight, name)), getattr(one, name), atol=FLOAT32_ATOL)
    step_taken = [np.linalg.norm(a - b) for a, b in zip(values_of(one.params), values_of(start(1).params))]
    assert np.linalg.norm(step_taken) > 1000 * FLOAT32_ATOL


CURVE = 50
MESHES = [(8, 1), (4, 2), pytest.param((1, 8), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def curve_of():
    """(mesh) -> 50 losses of a whole network under AdamW, its kernels split where the mesh has fsdp."""
    model = tiny_model(TinyNetwork())
    images = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8)
    number = np.arange(20, dtype=np.int32)
    data = Dataset(images, number % 3, number % 2, model.class_names, model.domain_names)
    loss_fn = make_diffusion_loss(model, DiffusionSettings(num_train_timesteps=T), TrainingSettings())
    params = random_params(model.init)
    optimizer, _ = make_optimizer(1e-3, 5, CURVE, 0.01, 1.0)

    def curve(*shape):
        mesh = make_mesh(*shape)
        with pytest.MonkeyPatch.context() as patch:
            # The network is small, so that only few arrays of it are large.
            patch.setattr("jaxdiff.mesh.LARGE", 64)
            state = create_state(params, optimizer, jax.random.key(7), mesh)
            step = make_train_step(loss_fn, optimizer, mesh, 0.9)
            results = list(fit(state, step, batches(data, 0, 8), CURVE, mesh))
        return [float(result.metrics["loss"]) for result in results], state, results[-1].state

    return functools.cache(curve)


@pytest.mark.parametrize("shape", MESHES)
def test_the_loss_curve_is_that_of_one_device(curve_of, shape):
    (one, _, _), (many, start, end) = curve_of(1), curve_of(*shape)
    np.testing.assert_allclose(many, one, atol=1e-5)
    assert np.ptp(one) > 1000 * 1e-5
    # The new state lies where the old one lay, and of the large arrays each device holds its part.
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
        held = {shard.data.size for shard in after.addressable_shards}
        large = after.size >= 64 and any(size % shape[1] == 0 for size in after.shape)
        assert held == {after.size // shape[1] if large else after.size}


def test_a_device_needs_less_memory_the_more_devices_share_the_state():
    optimizer, _ = make_optimizer(1e-3, 5, CURVE, 0.01, 1.0)
    params = scale_job.start_params()
    batch = scale_job.rows_at()(0)
    needed = {}
    for fsdp in (1, 2, 8):
        mesh = make_mesh(8 // fsdp, fsdp)
        state = create_state(params, optimizer, jax.random.key(0), mesh)
        step = jax.jit(make_train_step(scale_job.loss_fn, optimizer, mesh, 0.9), donate_argnums=0)
        needed[fsdp] = step.lower(state, put_batch(batch, mesh)).compile().memory_analysis().argument_size_in_bytes
    # Parameters, average and two moments, of which all but the small arrays is shared.
    whole, large = (4 * 4 * sum(leaf.size for leaf in params.values() if leaf.size >= least) for least in (0, LARGE))
    assert large > 0.8 * whole
    for fsdp, found in needed.items():
        assert found == pytest.approx(whole - large + large / fsdp, rel=0.001)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(network_run, tmp_path):
    start, batch_at, steps = network_run
    mesh = make_mesh(1)

    def last(state, num_steps):
        *_, result = fit(state, steps[1], batch_at, num_steps, mesh)
        return result.state

    whole = last(start(1), 5)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(2, last(start(1), 2))
    checkpoints.close()
    # Another key, so that the restored one is seen to be used.
    restored, step = Checkpoints(tmp_path / "c").restore(start(1, key=8))
    assert step == int(restored.step) == 2
    assert_same_bits(last(restored, 5), whole)


def test_fit_yields_every_step_once_and_asks_for_no_batch_too_many():
    mesh = make_mesh(1)
    step = make_train_step(toy_loss, SGD, mesh, 0.9)
    asked = []

    def batch_at(step):
        asked.append(step)
        return toy_batch(step)

    state = create_state(toy_params(), SGD, jax.random.key(0), mesh)
    results = list(fit(state, step, batch_at, 3, mesh))
    assert [result.step for result in results] == [1, 2, 3]
    assert asked == [0, 1, 2]
    assert list(fit(results[-1].state, step, batch_at, 3, mesh)) == []
    assert asked == [0, 1, 2]


# The loop


class Loop:
    """A training loop of 8 steps on the toy problem, and what its steps are without the loop."""

    def __init__(self):
        self.mesh = make_mesh(1)
        self.optimizer, self.learning_rate = make_optimizer(0.1, 2, 8, 0.1, 1.0)
        self.train_step = make_train_step(toy_loss, self.optimizer, self.mesh, 0.9)
        self._start = create_state(toy_params(), self.optimizer, jax.random.key(0), self.mesh)
        # (loss, gradient norm, state's values) of each step.
        self.expected = [
            (float(result.metrics["loss"]), float(result.metrics["gradient_norm"]), values_of(result.state))
            for result in fit(self.start(), self.train_step, toy_batch, 8, self.mesh)
        ]

    def start(self):
        return jax.tree.map(jnp.copy, self._start)

    def run(
        self,
        folder,
        batch_at=toy_batch,
        learning_rate=None,
        validation_loss=None,
        sample=None,
        sampled=None,
        **settings,
    ):
        checkpoints = Checkpoints(folder / "checkpoints", keep_last=10)
        state, resumed = checkpoints.restore(self.start()) or (self.start(), 0)
        log = MetricsLog(folder, resumed)
        try:
            return TrainingLoop(
                self.train_step,
                batch_at,
                TrainingSettings(train_steps=8, batch_size=16, **settings),
                self.mesh,
                checkpoints,
                log,
                learning_rate or self.learning_rate,
                validation_loss and (lambda params: {"validation_loss": validation_loss(params)}),
                sample,
                sampled,
            ).run(state)
        finally:
            log.close()
            checkpoints.close()

    def saved(self, folder):
        """Return the steps of all checkpoints, and the newest one's state."""
        checkpoints = Checkpoints(folder / "checkpoints")
        steps, restored = checkpoints.steps(), checkpoints.restore(self.start())
        checkpoints.close()
        return steps, None if restored is None else restored[0]


@pytest.fixture(scope="module")
def loop():
    return Loop()


def assert_last_step(loop, state, step=8):
    for value, other in zip(values_of(state), loop.expected[step - 1][2], strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.fixture
def handlers():
    """Harmless handlers, so that a request which nobody takes fails a test instead of ending the test run."""
    unheeded = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: unheeded.append(True)) for number in numbers}
    ours = {number: signal.getsignal(number) for number in numbers}
    yield unheeded, ours
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_finished_loop_has_logged_saved_and_drawn_what_was_due(loop, tmp_path):
    drawn, validated = [], []

    def validation_loss(ema_params):
        validated.append(values_of(ema_params))
        return jnp.float32(len(validated))

    state = loop.run(
        tmp_path,
        validation_loss=validation_loss,
        sample=lambda step, ema_params: drawn.append((step, values_of(ema_params))),
        log_every=3,
        save_every=4,
        sample_every=2,
    )
    assert_last_step(loop, state)
    steps, saved = loop.saved(tmp_path)
    assert steps == [4, 8]
    assert_same_bits(saved, state)
    # The last step needs no picture along the way.
    assert [step for step, _ in drawn] == [2, 4, 6]
    assert len(validated) == 2
    # Averages are judged and drawn, as of their own step.
    for value, at_4, at_8 in zip(values_of(saved.ema_params), validated[0], validated[1], strict=True):
        np.testing.assert_array_equal(value, at_8)
        assert not np.array_equal(at_4, at_8)
    for value, at_4 in zip(drawn[1][1], validated[0], strict=True):
        np.testing.assert_array_equal(value, at_4)
    lines = read_lines(tmp_path / METRICS)
    logged = {line["step"]: line for line in lines if "loss" in line}
    assert list(logged) == [3, 6, 8]
    for first, last in ((0, 3), (3, 6), (6, 8)):
        losses, norms, _ = zip(*loop.expected[first:last])
        assert logged[last]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert logged[last]["gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-6)
        assert logged[last]["images_per_second"] > 0
        assert logged[last]["learning_rate"] == pytest.approx(float(loop.learning_rate(last - 1)))
    assert [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line] == [(4, 1), (8, 2)]


# At a step that is saved, at the one before it, at the last, and at the first.
BAD = [(6, 2, 20, [2, 4]), (6, 2, 1, [2, 4]), (5, 2, 20, [2, 4]), (8, 3, 20, [3, 6]), (1, 1, 20, [])]


@pytest.mark.parametrize(("bad_step", "save_every", "log_every", "good"), BAD)
def test_a_loss_that_is_not_finite_names_its_step_and_is_never_saved(
    loop, tmp_path, bad_step, save_every, log_every, good
):
    def batch_at(step):
        batch = toy_batch(step)
        return batch._replace(x=np.full_like(batch.x, np.nan)) if step + 1 == bad_step else batch

    left = f"last good checkpoint is step {good[-1]}" if good else "Nothing was saved"
    with pytest.raises(InputError, match=rf"diverged at step {bad_step}: loss nan.*{left}"):
        loop.run(tmp_path, batch_at, log_every=log_every, save_every=save_every)
    steps, saved = loop.saved(tmp_path)
    assert steps == good
    if good:
        assert_last_step(loop, saved, good[-1])
    # Going on with good batches ends as if nothing had happened.
    assert_last_step(loop, loop.run(tmp_path))


def test_a_validation_loss_that_is_not_finite_is_not_saved_either(loop, tmp_path):
    losses = iter([1.0, float("inf")])
    with pytest.raises(InputError, match=r"diverged at step 4: validation loss inf\. .* is step 2"):
        loop.run(tmp_path, validation_loss=lambda _: jnp.float32(next(losses)), save_every=2)
    assert loop.saved(tmp_path)[0] == [2]


def test_a_state_that_is_not_finite_is_not_saved_though_its_loss_and_gradient_were(loop, tmp_path):
    def blow_up(state, batch):
        state, metrics = train_step(state, batch)
        bias = jnp.where(state.step == 4, jnp.inf, state.params["bias"])
        return state.replace(params={**state.params, "bias": bias}), metrics

    train_step = loop.train_step
    loop.train_step = blow_up
    try:
        with pytest.raises(InputError, match=r"diverged at step 4: params\.bias is not finite\. .* is step 2"):
            loop.run(tmp_path, save_every=2)
    finally:
        loop.train_step = train_step
    assert loop.saved(tmp_path)[0] == [2]


@pytest.mark.parametrize(
    ("number", "during"),
    [
        (signal.SIGTERM, "the first batch"),
        (signal.SIGTERM, "a batch"),
        (signal.SIGINT, "a batch"),
        (signal.SIGTERM, "the last batch"),
        (signal.SIGTERM, "a picture"),
    ],
)
def test_a_stop_request_saves_the_step_it_names_and_a_new_run_goes_on(loop, tmp_path, handlers, number, during):
    unheeded, ours = handlers

    def batch_at(step):
        if (during, step) in (("the first batch", 0), ("a batch", 3), ("the last batch", 7)):
            os.kill(os.getpid(), number)
        return toy_batch(step)

    def sample(step, ema_params):
        if during == "a picture":
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRun) as caught:
        loop.run(tmp_path, batch_at, sample=sample, save_every=100, sample_every=5)
    assert unheeded == []
    assert {number: signal.getsignal(number) for number in ours} == ours
    (step,) = map(int, re.findall(r"saved at step (\d+) of 8", str(caught.value)))
    steps, saved = loop.saved(tmp_path)
    assert steps == [step]
    assert_last_step(loop, saved, step)
    assert_last_step(loop, loop.run(tmp_path))


def test_what_was_not_drawn_where_a_run_stopped_is_drawn_where_it_goes_on(loop, tmp_path, handlers):
    def run(folder, drawn, stop_at=None):
        def batch_at(step):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return toy_batch(step)

        def sample(step, ema_params):
            drawn.append((step, values_of(ema_params)))

        def sampled(step):
            return step in [number for number, _ in drawn]

        loop.run(folder, batch_at, sample=sample, sampled=sampled, save_every=100, sample_every=1)

    whole, parted = [], []
    run(tmp_path / "whole", whole)
    with pytest.raises(InterruptedRun):
        run(tmp_path / "parted", parted, stop_at=3)
    assert loop.saved(tmp_path / "parted")[0] == [len(parted) + 1]
    run(tmp_path / "parted", parted)
    assert [step for step, _ in whole] == list(range(1, 8))
    assert [step for step, _ in parted] == list(range(1, 8))
    for (_, one), (_, other) in zip(whole, parted):
        for value, again in zip(one, other, strict=True):
            np.testing.assert_array_equal(value, again)


@pytest.mark.parametrize("during", ["logged", "saved"])
def test_a_stop_request_while_the_last_step_is_logged_or_saved_stops_what_would_follow(
    loop, tmp_path, handlers, during
):
    def learning_rate(step):
        if during == "logged":
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.1

    def validation_loss(ema_params):
        if during == "saved":
            os.kill(os.getpid(), signal.SIGTERM)
        return jnp.float32(1.0)

    with pytest.raises(InterruptedRun, match="saved at step 8 of 8"):
        loop.run(tmp_path, toy_batch, learning_rate, validation_loss, save_every=100, log_every=100)
    steps, saved = loop.saved(tmp_path)
    assert steps == [8]
    assert_last_step(loop, saved)
    assert_last_step(loop, loop.run(tmp_path))
    unheeded, ours = handlers
    assert unheeded == []
    assert {number: signal.getsignal(number) for number in ours} == ours


@pytest.mark.parametrize("save_every", [3, 4])
def test_drawing_can_end_the_run_with_everything_saved(loop, tmp_path, save_every):
    drawn = []

    def sample(step, _):
        drawn.append(step)
        return step == 6

    state = loop.run(tmp_path, sample=sample, sample_every=2, save_every=save_every, validation_loss=lambda _: 1.0)
    assert drawn == [2, 4, 6]
    assert_last_step(loop, state, 6)
    steps, saved = loop.saved(tmp_path)
    assert steps[-1] == 6
    assert_last_step(loop, saved, 6)
