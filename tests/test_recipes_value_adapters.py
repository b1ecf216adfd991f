"""Token-wise value adapters against torch: gradients, ten steps, whom they touch, their files, several at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import StableDiffusionPipeline
from stable_diffusion_twins import two_adapters
from test_recipes_custom_diffusion import RATE, STEPS, random_deltas, torch_name
from test_recipes_textual_inversion import BATCH, Twin, draws, world  # noqa: F401 (a fixture)

from jaxdiff import FlaxStableDiffusionPipeline
from jaxdiff.errors import InputError
from jaxdiff.io.adapters import OF, Adapter, of_words, read_adapter, write_adapter
from jaxdiff.mesh import make_mesh, put_batch
from jaxdiff.models.spatial_transformer import project_context
from jaxdiff.recipes.learned_words import add_words
from jaxdiff.recipes.stable_diffusion import encode_texts
from jaxdiff.recipes.text_to_image_model import prepare
from jaxdiff.recipes.textual_inversion import make_inversion_loss
from jaxdiff.recipes.training import create_state, fit, image_keys_at, make_train_step
from jaxdiff.recipes.value_adapters import give_values, with_values, zero_values
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

pytestmark = pytest.mark.usefixtures("quick_commands")


class OwnValues(torch.nn.Module):
    """Equation (1): a projection to values, with one more for the tokens of each word."""

    def __init__(self, before: torch.nn.Linear, words):
        super().__init__()
        self.before, self.ids = before, None
        self.own = torch.nn.ParameterList(torch.zeros(before.in_features, before.out_features) for _ in words)

    def forward(self, context):
        value = self.before(context)
        for matrix, mask in zip(self.own, self.masks):
            value = value + mask[..., None] * (context @ matrix)
        return value


class ValueTwin(Twin):
    """Trains the matrices of words alone."""

    def __init__(self, theirs, rows, tokens):
        super().__init__(theirs, rows)
        self.table.requires_grad_(False)
        self.tokens = tokens
        self.values = {}
        for name, module in list(self.unet.named_modules()):
            if name.endswith("attn2.to_v"):
                self.values[f"{name}.weight"] = wrapped = OwnValues(module, tokens)
                self.unet.get_submodule(name.removesuffix(".to_v")).to_v = wrapped

    def loss(self, batch, *draws):
        ids = torch.from_numpy(np.asarray(batch.input_ids)).long()
        for module in self.values.values():
            module.masks = [torch.isin(ids, torch.tensor(own)).float() for own in self.tokens]
        return super().loss(batch, *draws)


@pytest.fixture(scope="module")
def learning(world):  # noqa: F811
    theirs, model, params, rows, batch_at, tokenizer, _ = world
    words = list(rows)
    model = give_values(model, tokenizer, rows)
    assert [len(own) for own in model.own_values] == [2, 2]
    start = {name: jnp.asarray(leaf) for name, leaf in (rows | zero_values(params, words)).items()}
    loss_fn = make_inversion_loss(model, words)
    twin = ValueTwin(StableDiffusionPipeline.from_pretrained(theirs.config._name_or_path), rows, model.own_values)
    matrices = {
        f"{word}{OF}{name}": twin.values[torch_name(name)].own[number]
        for number, word in enumerate(words)
        for name in {name.rsplit(OF, 1)[1] for name in start if OF in name}
    }
    assert matrices.keys() == of_words(start).keys()
    return model, params, start, loss_fn, batch_at, twin, matrices


@pytest.mark.slow
def test_ten_steps_are_those_of_torch_and_nothing_else_moves(learning):
    _, params, start, loss_fn, batch_at, twin, matrices = learning
    mesh, key = make_mesh(1), jax.random.key(3)
    kinds = {name: "matrices" if name in matrices else "rows" for name in start}
    optimizer = optax.multi_transform(
        {"rows": optax.set_to_zero(), "matrices": optax.adamw(RATE, weight_decay=0.0)}, kinds
    )
    state = create_state(start, optimizer, key, mesh)
    batch = batch_at(0)
    gradient = jax.jit(jax.grad(loss_fn))(
        state.params, put_batch(batch, mesh), image_keys_at(key, jnp.int32(0), BATCH), params
    )
    twin.loss(batch, *draws(key, 0, batch.mean.shape[1:])).backward()
    for name, matrix in matrices.items():
        expected = matrix.grad.numpy()
        assert np.abs(expected).max() > 1e-6
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-2 * np.abs(expected).max())

    *_, last = fit(state, make_train_step(loss_fn, optimizer, mesh, 0.9, frozen=params), batch_at, STEPS, mesh)
    adam = torch.optim.AdamW(list(matrices.values()), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        adam.zero_grad()
        batch = batch_at(step)
        twin.loss(batch, *draws(key, step, batch.mean.shape[1:])).backward()
        adam.step()
    for name, matrix in matrices.items():
        np.testing.assert_allclose(last.state.params[name], matrix.detach().numpy(), rtol=0, atol=1e-4)
        assert np.abs(last.state.params[name]).max() > 0.5 * RATE
    for word in start.keys() - matrices.keys():
        np.testing.assert_array_equal(last.state.params[word], start[word])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, and value adapters of two words, learned apart."""

    def deltas_of(params, word, number):
        rng = np.random.default_rng(number)
        zeros = zero_values(params, [word])
        return {name: np.float32(0.1 * rng.standard_normal(zero.shape)) for name, zero in zeros.items()}

    return two_adapters(tmp_path_factory.mktemp("base"), deltas_of)


def load(folder, *files):
    settings = LatentModelSettings(str(folder / "model"), adapters=files)
    return prepare(settings, PictureSettings(num_steps=1), make_mesh(1))


def by_attention(tree, path=()):
    """Yield name, keys and values of each attention."""
    for name, node in tree.items():
        if "key" in node:
            yield ".".join((*path, name)), np.asarray(node["key"]), np.asarray(node["value"])
        else:
            yield from by_attention(node, (*path, name))


def test_several_at_once_change_the_values_of_their_own_tokens_and_nothing_else(base):
    folder, _, params, adapters = base
    drawing = load(folder, folder / "0.safetensors", folder / "1.safetensors")
    (ids,) = drawing.tokenize(["a photo of <one> and <two>"])
    # The same words without values of their own.
    pipeline, _ = FlaxStableDiffusionPipeline.from_pretrained(folder / "model")
    plain, with_rows = add_words(pipeline.model, params, pipeline.tokenizer, adapters[0].words | adapters[1].words)
    context = encode_texts(plain, with_rows, jnp.asarray(ids))
    before = {name: rest for name, *rest in by_attention(project_context(params["unet"], context, jnp.float32))}
    widened = drawing.encode(ids[None])
    assert widened.shape[-1] == 3 * 32
    found = list(by_attention(project_context(drawing.params["unet"], jnp.asarray(widened), jnp.float32)))
    assert {name for name, *_ in found} == before.keys()
    vectors = np.asarray(context[0])
    for name, key, value in found:
        np.testing.assert_allclose(key, before[name][0], rtol=0, atol=1e-6)
        expected = np.array(before[name][1][0])
        for adapter, own in zip(adapters, drawing.model.own_values):
            (word,) = adapter.words
            rows = np.isin(ids[0], own)
            assert rows.sum() == len(adapter.words[word])
            expected[rows] += vectors[rows] @ adapter.deltas[f"{word}{OF}{name}.to_v.kernel"]
        np.testing.assert_allclose(value[0], expected, rtol=0, atol=1e-5)
        assert np.abs(value[0] - before[name][1][0]).max() > 0.01


def test_there_is_nothing_to_merge(base):
    folder, *_ = base
    files = folder / "0.safetensors", folder / "1.safetensors"
    settings = LatentModelSettings(str(folder / "model"), adapters=files, captions=folder / "texts.txt")
    with pytest.raises(InputError, match="--captions has no effect"):
        prepare(settings, PictureSettings(num_steps=1), make_mesh(1))


def test_the_unet_sees_them_the_same_with_and_without_keys_and_values_kept(base):
    folder, _, params, _ = base
    drawing = load(folder, folder / "1.safetensors")
    (ids,) = drawing.tokenize(["<two>, a <two>"])
    context = jnp.asarray(drawing.encode(ids[None]))
    unet = drawing.params["unet"]
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 16, 4)), jnp.float32)
    t = jnp.full(1, 500)
    whole = jax.jit(drawing.model.unet.apply)({"params": unet}, x_t, t, context)
    kept = jax.jit(drawing.model.unet.apply)(
        {"params": unet, "text": project_context(unet, context, jnp.float32)}, x_t, t
    )
    np.testing.assert_allclose(whole, kept, rtol=0, atol=1e-5)
    without = jax.jit(drawing.model.unet.apply)({"params": with_values(params, {}, ["<two>"])["unet"]}, x_t, t, context)
    assert np.abs(np.asarray(whole) - np.asarray(without)).max() > 1e-3


def test_they_stand_beside_an_adapter_of_whole_matrices(base, tmp_path):
    folder, _, params, adapters = base
    whole = Adapter(adapters[0].base, {"<three>": np.ones((1, 32), np.float32)}, random_deltas(params, 2))
    write_adapter(tmp_path / "whole.safetensors", whole)
    drawing = load(folder, folder / "0.safetensors", tmp_path / "whole.safetensors")
    assert drawing.learned.keys() == {"<one>", "<three>"}
    assert len(drawing.model.own_values) == 1


def test_files_keep_them_whole_or_at_a_rank_and_what_is_damaged_is_refused(base, tmp_path):
    folder, *_, adapters = base
    found = read_adapter(folder / "1.safetensors")
    assert found.deltas.keys() == adapters[1].deltas.keys()
    for name, delta in adapters[1].deltas.items():
        np.testing.assert_array_equal(found.deltas[name], delta)
    write_adapter(tmp_path / "small.safetensors", adapters[1], rank=2)
    small = read_adapter(tmp_path / "small.safetensors")
    assert small.deltas.keys() == adapters[1].deltas.keys()
    assert all(np.linalg.matrix_rank(delta, tol=1e-4) == 2 for delta in small.deltas.values())
    name, delta = next(iter(adapters[1].deltas.items()))
    strange = {
        name.replace("<two>", "<four>"): "is nothing that a word of its own may have",
        name.replace("to_v", "to_k"): "is nothing that a word of its own may have",
        name.replace("kernel", "colonel"): "the UNet has no",
    }
    for other, sentence in strange.items():
        write_adapter(tmp_path / "strange.safetensors", adapters[1]._replace(deltas={other: delta}))
        with pytest.raises(InputError, match=sentence):
            load(folder, tmp_path / "strange.safetensors")
