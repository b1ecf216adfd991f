"""Custom Diffusion against torch and closed forms: gradients, ten steps, adapters' files, and their merge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import StableDiffusionPipeline
from stable_diffusion_twins import two_adapters
from test_recipes_textual_inversion import BATCH, Twin, draws, world  # noqa: F401 (a fixture)

from jaxdiff.errors import InputError
from jaxdiff.io.adapters import read_adapter, write_adapter
from jaxdiff.io.weights import flatten_params, write_safetensors
from jaxdiff.mesh import make_mesh, put_batch
from jaxdiff.models.autoencoder import LatentNormal
from jaxdiff.recipes.custom_diffusion import (
    DIFFUSERS_FILE,
    base_hash,
    text_matrices,
    with_deltas,
    write_for_diffusers,
    zero_deltas,
)
from jaxdiff.recipes.inversion_batches import Source, make_batches
from jaxdiff.recipes.learned_words import TABLE, get_leaf, set_leaf
from jaxdiff.recipes.merging import everyday_captions, features_of_words, make_merge
from jaxdiff.recipes.stable_diffusion import encode_texts
from jaxdiff.recipes.text_to_image_model import prepare
from jaxdiff.recipes.textual_inversion import make_inversion_loss, make_latent_loss, with_rows, with_trained
from jaxdiff.recipes.training import create_state, fit, image_keys_at, make_train_step
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

pytestmark = pytest.mark.usefixtures("quick_commands")
RATE, STEPS = 1e-3, 10


def torch_name(name: str) -> str:
    """Return diffusers' name of a matrix."""
    block, *rest = name.replace("_0", ".0").replace("_1", ".1").split(".kernel")[0].split(".")
    return ".".join([block, *rest]) + ".weight"


class CustomTwin(Twin):
    """Trains keys and values of the text too."""

    def __init__(self, theirs, rows):
        super().__init__(theirs, rows)
        self.matrices = {n: p for n, p in self.unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n}
        for matrix in self.matrices.values():
            matrix.requires_grad_(True)


def random_deltas(params, seed: int, scale: float = 0.05) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.standard_normal(zero.shape)) for name, zero in zero_deltas(params).items()}


@pytest.mark.slow
def test_ten_steps_of_keys_values_and_rows_are_those_of_torch_and_nothing_else_moves(world):  # noqa: F811
    theirs, model, params, rows, batch_at, *_ = world
    twin = CustomTwin(StableDiffusionPipeline.from_pretrained(theirs.config._name_or_path), rows)
    others = {name: value.clone() for name, value in twin.unet.state_dict().items() if name not in twin.matrices}
    names = text_matrices(params)
    assert {torch_name(name) for name in names} == set(twin.matrices)
    start = {name: jnp.asarray(leaf) for name, leaf in (rows | zero_deltas(params)).items()}
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    mesh, key = make_mesh(1), jax.random.key(3)
    loss_fn = make_inversion_loss(model, list(rows))
    state = create_state(start, optimizer, key, mesh)

    batch = batch_at(0)
    gradient = jax.jit(jax.grad(loss_fn))(
        state.params, put_batch(batch, mesh), image_keys_at(key, jnp.int32(0), BATCH), params
    )
    twin.loss(batch, *draws(key, 0, batch.mean.shape[1:])).backward()
    expected = twin.table.grad[len(twin.old) :].numpy()
    np.testing.assert_allclose(np.concatenate([gradient[word] for word in rows]), expected, rtol=0, atol=1e-5)
    for name in names:
        expected = twin.matrices[torch_name(name)].grad.numpy().T
        assert np.abs(expected).max() > 1e-5
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-5)

    *_, last = fit(state, make_train_step(loss_fn, optimizer, mesh, 0.9, frozen=params), batch_at, STEPS, mesh)
    adam = torch.optim.AdamW([twin.table, *twin.matrices.values()], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        adam.zero_grad()
        batch = batch_at(step)
        twin.loss(batch, *draws(key, step, batch.mean.shape[1:])).backward()
        adam.step()
        with torch.no_grad():
            twin.table[: len(twin.old)] = twin.old
    flat = flatten_params(params["unet"])
    for name in names:
        found = np.asarray(flat[name] + last.state.params[name])
        np.testing.assert_allclose(found, twin.matrices[torch_name(name)].detach().numpy().T, rtol=0, atol=1e-4)
        assert np.abs(last.state.params[name]).max() > 0.5 * RATE
    for name, value in others.items():
        assert torch.equal(twin.unet.state_dict()[name], value)
    drawn, before = (flatten_params(tree) for tree in (with_trained(params, last.state.params, list(rows)), params))
    table = ".".join(TABLE)
    assert {name for name in before if name != table and np.any(drawn[name] != before[name])} == {
        f"unet.{name}" for name in names
    }
    np.testing.assert_array_equal(drawn[table][: len(twin.old)], before[table])


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_class_pictures_keep_their_half_and_their_weight(world, weight):  # noqa: F811
    _, model, params, rows, _, tokenizer, _ = world
    rng = np.random.default_rng(0)

    def source(text: str, sign: float) -> Source:
        mean = np.float32(sign + np.abs(rng.standard_normal((3, 16, 16, 4))))
        return Source([text], LatentNormal(mean, np.full_like(mean, -30)))

    concepts, priors = [source("a photo of <one>", 5), source("<two>", 5)], [source("a photo of cat", -20)]
    batch = make_batches(concepts, tokenizer, rows, BATCH, 1, priors, weight)(3)
    of_class = batch.mean.mean(axis=(1, 2, 3)) < 0
    assert of_class.tolist() == [False, True] * (BATCH // 2)
    ids = tokenizer(["a photo of cat"], length=tokenizer.context_length).input_ids[0]
    np.testing.assert_array_equal((batch.input_ids == ids).all(axis=1), of_class)
    # One mean of each half, the second weighted; each half by itself has the same random numbers.
    keys = image_keys_at(jax.random.key(0), jnp.int32(0), BATCH)
    loss = jax.jit(make_inversion_loss(model, list(rows)))
    rows = {word: jnp.asarray(row) for word, row in rows.items()}
    halves = [
        loss(
            rows,
            jax.tree.map(lambda leaf, half=half: leaf[half::2], batch._replace(weight=None)),
            keys[half::2],
            params,
        )
        for half in (0, 1)
    ]
    np.testing.assert_allclose(loss(rows, batch, keys, params), halves[0] + weight * halves[1], rtol=1e-5)


def test_what_a_mask_hides_has_no_part_in_the_loss(world):  # noqa: F811
    _, model, frozen, start, batch_at, *_ = world
    batch = batch_at(0)
    mask = np.zeros((BATCH, 16, 16), np.float32)
    mask[:, 2:9, 4:12] = 1
    keys = image_keys_at(jax.random.key(0), jnp.int32(0), BATCH)
    # The same in NumPy, from what the UNet predicts.
    z, t, eps = draws(jax.random.key(0), 0, batch.mean.shape[1:])
    params = with_rows(frozen, {word: jnp.asarray(row) for word, row in start.items()})
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[np.asarray(t)][:, None, None, None]
    x_0 = 0.18215 * (batch.mean + np.exp(0.5 * batch.log_variance) * np.asarray(z))
    x_t = jnp.asarray(np.sqrt(alphas) * x_0 + np.sqrt(1 - alphas) * np.asarray(eps), jnp.float32)
    context = encode_texts(model, params, jnp.asarray(batch.input_ids))
    error = (np.asarray(jax.jit(model.unet.apply)({"params": params["unet"]}, x_t, t, context)) - np.asarray(eps)) ** 2
    expected = error[:, 2:9, 4:12].mean()
    found = jax.jit(make_latent_loss(model))(params, put_batch(batch._replace(mask=mask), make_mesh(1)), keys)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(expected - error.mean()) > 1e-3 * expected


def test_the_merge_is_the_solution_of_the_constrained_least_squares():
    rng = np.random.default_rng(0)
    size, out, count = 12, 7, 3
    captions, features = rng.standard_normal((200, size)), rng.standard_normal((count, size))
    before, wanted = rng.standard_normal((size, out)), rng.standard_normal((count, out))
    found = before + make_merge(captions.T @ captions, features)(wanted - features @ before)
    # Karush, Kuhn and Tucker: 2 C_reg^T C_reg (W - W_0) + C^T multipliers = 0 and C W = V, as one linear system.
    gram = captions.T @ captions
    system = np.block([[2 * gram, features.T], [features, np.zeros((count, count))]])
    solution = np.linalg.solve(system, np.concatenate([2 * gram @ before, wanted]))[:size]
    np.testing.assert_allclose(found, solution, rtol=0, atol=1e-5)
    np.testing.assert_allclose(features @ found, wanted, atol=1e-9)


def test_what_contradicts_itself_is_not_merged():
    features = np.ones((2, 5))
    merge = make_merge(np.eye(5), features)
    np.testing.assert_allclose(features @ merge(np.ones((2, 3))), 1, atol=1e-6)
    with pytest.raises(InputError, match="two of their words mean nearly the same"):
        merge(np.array([[1.0], [-1.0]]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, and two adapters of it."""
    return two_adapters(tmp_path_factory.mktemp("base"), lambda params, word, number: random_deltas(params, number))


def test_merged_matrices_do_for_each_word_what_its_own_do(base):
    folder, _, params, adapters = base
    files = tuple(folder / f"{number}.safetensors" for number in (0, 1))
    one = PictureSettings(num_steps=1)
    drawing = prepare(LatentModelSettings(str(folder / "model"), adapters=files), one, make_mesh(1))
    merged, old = (flatten_params(tree["unet"]) for tree in (drawing.params, params))
    changed = {name for name in old if np.any(np.asarray(merged[name]) != np.asarray(old[name]))}
    assert changed == set(text_matrices(params))
    texts = drawing.tokenizer(everyday_captions()[:20], length=77).input_ids
    everyday = np.asarray(encode_texts(drawing.model, drawing.params, jnp.asarray(texts)), np.float64).reshape(-1, 32)
    for adapter in adapters:
        features = features_of_words(drawing.model, drawing.params, drawing.tokenizer, adapter.words)
        assert len(features) == sum(map(len, adapter.words.values()))
        for name in changed:
            delta, own = np.float64(merged[name] - old[name]), np.float64(adapter.deltas[name])
            np.testing.assert_allclose(features @ delta, features @ own, rtol=0, atol=1e-5)
            assert np.linalg.norm(everyday @ delta) < 0.5 * np.linalg.norm(everyday @ own)


def test_one_adapter_is_the_model_that_was_trained(base):
    folder, _, params, adapters = base
    settings = LatentModelSettings(str(folder / "model"), adapters=(folder / "0.safetensors",))
    drawing = prepare(settings, PictureSettings(num_steps=1), make_mesh(1))
    trained = flatten_params(with_deltas(params, adapters[0].deltas)["unet"])
    for name, leaf in flatten_params(drawing.params["unet"]).items():
        np.testing.assert_array_equal(leaf, trained[name])
    np.testing.assert_array_equal(drawing.learned["<one>"], adapters[0].words["<one>"])


def test_matrices_open_in_diffusers(base, tmp_path):
    folder, pipeline, params, adapters = base
    write_for_diffusers(tmp_path / DIFFUSERS_FILE, params, adapters[0].deltas)
    theirs = StableDiffusionPipeline.from_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    x_t, context = np.float32(rng.standard_normal((2, 16, 16, 4))), np.float32(rng.standard_normal((2, 9, 32)))
    inputs = torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()), 500, torch.from_numpy(context)
    with torch.no_grad():
        before = theirs.unet(*inputs).sample.numpy()
        theirs.unet.load_attn_procs(str(tmp_path), weight_name=DIFFUSERS_FILE, _pipeline=theirs)
        expected = theirs.unet(*inputs).sample.numpy()
    changed = with_deltas(params, adapters[0].deltas)["unet"]
    found = jax.jit(pipeline.model.unet.apply)(
        {"params": changed}, jnp.asarray(x_t), jnp.full(2, 500), jnp.asarray(context)
    )
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    assert np.abs(expected - before).max() > 1e-3


def test_a_file_of_low_rank_holds_the_nearest_matrices(base, tmp_path):
    *_, adapters = base
    write_adapter(tmp_path / "small.safetensors", adapters[0], rank=3)
    assert (tmp_path / "small.safetensors").stat().st_size < 0.5 * (base[0] / "0.safetensors").stat().st_size
    small = read_adapter(tmp_path / "small.safetensors")
    assert small.base == adapters[0].base
    for name, delta in adapters[0].deltas.items():
        values = np.linalg.svd(np.float64(delta), compute_uv=False)
        error = np.linalg.norm(delta - small.deltas[name], 2)
        np.testing.assert_allclose(error, values[3], rtol=1e-4)
        assert np.linalg.matrix_rank(small.deltas[name], tol=1e-4) == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_hash_of_a_model_does_not_depend_on_what_it_computes_in(base, dtype):
    _, pipeline, params, adapters = base
    size = pipeline.tokenizer.vocab_size
    assert base_hash(jax.tree.map(lambda leaf: leaf.astype(dtype), params), size) == adapters[0].base
    longer = set_leaf(params, TABLE, jnp.concatenate([get_leaf(params, TABLE), jnp.ones((2, 32))]))
    assert base_hash(longer, size) == adapters[0].base
    assert base_hash(longer, size + 1) != adapters[0].base


def test_what_cannot_be_used_is_refused(base, tmp_path):
    folder, *_, adapters = base

    def load(*files):
        prepare(LatentModelSettings(str(folder / "model"), adapters=files), PictureSettings(num_steps=1), make_mesh(1))

    write_adapter(tmp_path / "other.safetensors", adapters[0]._replace(base="0" * 64))
    with pytest.raises(InputError, match=rf"hash {'0' * 64}, but this model's is {adapters[0].base}"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="<one> is in another of them too"):
        load(folder / "0.safetensors", folder / "0.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing.safetensors")
    about = {"format": "jaxdiff.adapter", "version": "2", "base": adapters[0].base}
    for metadata, sentence in (({}, "no adapter of jaxdiff"), (about, "version 2 of the format, but only 1 is known")):
        write_safetensors(tmp_path / "a.safetensors", {"word.<a>": np.ones((1, 32), np.float32)}, metadata)
        with pytest.raises(InputError, match=sentence):
            load(tmp_path / "a.safetensors")
    about["version"] = "1"
    for name, sentence in (("other", "neither vectors of a word"), ("unet.conv_in.kernel", "the UNet has no conv_in"),
                           ("unet.a.left", "has no unet.a.right"), ("unet.a.right", "has no other half")):  # fmt: skip
        write_safetensors(tmp_path / "a.safetensors", {name: np.ones((3, 2), np.float32)}, about)
        with pytest.raises(InputError, match=sentence):
            load(tmp_path / "a.safetensors")
    write_adapter(tmp_path / "a.safetensors", adapters[0]._replace(words={}))
    with pytest.raises(InputError, match="an adapter without words cannot be merged"):
        load(tmp_path / "a.safetensors", folder / "1.safetensors")
