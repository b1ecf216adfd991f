"""Textual inversion against the same in torch: gradients of the rows, and ten steps of the whole training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from PIL import Image
from sklearn.datasets import load_sample_images
from stable_diffusion_twins import SCHEDULER, make_pipeline

from jaxdiff import FlaxStableDiffusionPipeline
from jaxdiff.diffusion.samplers import starting_noise
from jaxdiff.errors import InputError
from jaxdiff.io.concept_pictures import TEMPLATES, parse_concept, read_concept_pictures, texts_of
from jaxdiff.io.learned_embeddings import write_learned, write_learned_apart
from jaxdiff.mesh import make_mesh, put_batch
from jaxdiff.recipes.custom_diffusion import base_hash
from jaxdiff.recipes.inversion_batches import Source, make_batches
from jaxdiff.recipes.inversion_data import shrink_masks
from jaxdiff.recipes.inversion_parts import prepare_inversion
from jaxdiff.recipes.learned_words import TABLE, add_words, first_rows, get_leaf, set_leaf
from jaxdiff.recipes.stable_diffusion import decode_latents, make_latent_sampler
from jaxdiff.recipes.text_to_image_model import prepare
from jaxdiff.recipes.textual_inversion import (
    encode_pictures,
    initial_rows,
    make_inversion_loss,
    with_trained,
)
from jaxdiff.recipes.timestep_bands import band_names, make_check
from jaxdiff.recipes.training import create_state, fit, image_keys_at, make_train_step
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings
from jaxdiff.textual_inversion_settings import InversionSettings

pytestmark = pytest.mark.usefixtures("quick_commands")
LEARNING_RATE, BATCH, STEPS = 0.02, 8, 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny pipeline on both sides, and two concepts of a few real pictures."""
    folder = tmp_path_factory.mktemp("inversion")
    # One level: what compiles here is the gradient, again and again.
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    make_pipeline(folder / "model", block_out_channels=(32,), **blocks)
    theirs = StableDiffusionPipeline.from_pretrained(folder / "model")
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, photo in zip(("thing", "style"), load_sample_images().images):
        (folder / name).mkdir()
        for number in range(3):
            top, left = rng.integers(300), rng.integers(500)
            Image.fromarray(photo[top : top + 60, left : left + 80]).save(folder / name / f"{number}.png")
    concepts = [parse_concept(f"<one>:{folder / 'thing'}:cat"), parse_concept(f"<two>:{folder / 'style'}:of:style")]
    rows = initial_rows(params, pipeline.tokenizer, concepts, {}, 2, mean=False)
    model, with_words = add_words(pipeline.model, params, pipeline.tokenizer, rows)
    mesh = make_mesh(1)
    latents = [
        encode_pictures(model, with_words, read_concept_pictures(concept, 32).pixels, mesh) for concept in concepts
    ]
    batch_at = make_batches(
        [Source(*each) for each in zip(texts_of(concepts), latents)], pipeline.tokenizer, rows, BATCH, seed=5
    )
    return theirs, model, params, rows, batch_at, pipeline.tokenizer, concepts


def test_what_learning_starts_from(world):
    theirs, _, params, rows, _, tokenizer, concepts = world
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()
    number = theirs.tokenizer("cat").input_ids[1]
    np.testing.assert_array_equal(rows["<one>"], np.stack([table[number]] * 2))
    several = [parse_concept("<three>:x:cat digit")]
    with pytest.raises(InputError, match=r"several tokens, 'cat</w>' \+ 'digit</w>'"):
        initial_rows(params, tokenizer, several, {}, 1, mean=False)
    ids = theirs.tokenizer("cat digit").input_ids[1:-1]
    np.testing.assert_allclose(
        initial_rows(params, tokenizer, several, {}, 1, mean=True)["<three>"][0], table[ids].mean(0), rtol=1e-6
    )
    assert concepts[1].kind == "style"


def test_pictures_are_encoded_as_by_diffusers(world):
    theirs, model, params, *_, concepts = world
    pixels = read_concept_pictures(concepts[0], 32).pixels
    found = encode_pictures(model, params, pixels, make_mesh(1))
    with torch.no_grad():
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        expected = theirs.vae.encode(images).latent_dist
    np.testing.assert_allclose(found.mean, expected.mean.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(found.log_variance, expected.logvar.numpy().transpose(0, 2, 3, 1), atol=1e-5)


class Twin:
    """The same training in torch: the whole table is trained, and all but the new rows is put back after each step."""

    def __init__(self, theirs, rows):
        self.pipeline = theirs
        self.encoder, self.unet = theirs.text_encoder, theirs.unet
        for module in (theirs.vae, self.unet, self.encoder):
            module.requires_grad_(False)
        start = torch.from_numpy(np.concatenate(list(rows.values())))
        # Without the rows that another twin of the same pipeline has added.
        old = self.encoder.get_input_embeddings().weight.detach()[: len(theirs.tokenizer)].clone()
        self.encoder.resize_token_embeddings(len(old) + len(start), mean_resizing=False)
        self.table = self.encoder.get_input_embeddings().weight
        with torch.no_grad():
            self.table[: len(old)], self.table[len(old) :] = old, start
        self.table.requires_grad_(True)
        self.old = old
        self.scheduler = DDPMScheduler(**{n: SCHEDULER[n] for n in ("beta_start", "beta_end", "beta_schedule")})

    def loss(self, batch, z, t, eps, gamma: float | None = None) -> torch.Tensor:
        """Return the loss with given random numbers, channels last; `gamma` clamps min-SNR weights."""
        mean, log_variance, z, eps = (
            torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
            for x in (batch.mean, batch.log_variance, z, eps)
        )
        x_0 = 0.18215 * (mean + torch.exp(0.5 * log_variance) * z)
        t = torch.from_numpy(np.asarray(t)).long()
        x_t = self.scheduler.add_noise(x_0, eps, t)
        context = self.encoder(torch.from_numpy(batch.input_ids).long())[0]
        errors = torch.nn.functional.mse_loss(self.unet(x_t, t, context).sample, eps, reduction="none").mean((1, 2, 3))
        if gamma is None:
            return errors.mean()
        # arXiv 2303.09556, section 3.4: of a network that predicts noise.
        snr = compute_snr(self.scheduler, t)
        return (errors * snr.clamp(max=gamma) / snr).mean()


def draws(key, step: int, shape, first: int = 0, end: int = 1000):
    """Return the random numbers of one step, by the streams that the training documents."""
    keys = image_keys_at(key, jnp.int32(step), BATCH)
    split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    z, eps = (jax.vmap(lambda key: jax.random.normal(key, shape))(split[i]) for i in (0, 2))
    t = jax.vmap(lambda key: jax.random.randint(key, (), first, end))(split[1])
    return z, t, eps


def test_ten_steps_are_those_of_torch_and_nothing_else_moves(world):
    theirs, model, params, rows, batch_at, *_ = world
    before = jax.tree.map(np.array, params)
    twin = Twin(theirs, rows)
    optimizer = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    mesh = make_mesh(1)
    loss_fn = make_inversion_loss(model, list(rows))
    state = create_state({word: jnp.asarray(row) for word, row in rows.items()}, optimizer, jax.random.key(3), mesh)
    key = jax.random.key(3)
    # The gradient of the first step, alone.
    batch = batch_at(0)
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(
        state.params, put_batch(batch, mesh), image_keys_at(key, jnp.int32(0), BATCH), params
    )
    theirs_loss = twin.loss(batch, *draws(key, 0, batch.mean.shape[1:]))
    theirs_loss.backward()
    found = np.concatenate([gradient[word] for word in rows])
    expected = twin.table.grad[len(twin.old) :].numpy()
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(float(loss), theirs_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    results = fit(state, make_train_step(loss_fn, optimizer, mesh, 0.9, frozen=params), batch_at, STEPS, mesh)
    *_, last = results
    adam = torch.optim.AdamW([twin.table], lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        adam.zero_grad()
        batch = batch_at(step)
        twin.loss(batch, *draws(key, step, batch.mean.shape[1:])).backward()
        adam.step()
        with torch.no_grad():
            twin.table[: len(twin.old)] = twin.old
    learned = np.concatenate([last.state.params[word] for word in rows])
    np.testing.assert_allclose(learned, twin.table[len(twin.old) :].detach().numpy(), rtol=0, atol=1e-4)
    assert (np.abs(learned - np.concatenate(list(rows.values()))).max(axis=1) > 0.01).all()
    # The model that draws with them has those rows, and else what it had.
    drawn = with_trained(params, last.state.params, list(rows))
    table = get_leaf(drawn, TABLE)
    np.testing.assert_array_equal(table[len(twin.old) :], learned)
    drawn = set_leaf(drawn, TABLE, table[: len(twin.old)])
    jax.tree.map(np.testing.assert_array_equal, drawn, before)


def test_min_snr_weights_are_those_of_diffusers(world):
    theirs, model, params, rows, batch_at, *_ = world
    twin, key, batch = Twin(theirs, rows), jax.random.key(5), batch_at(0)
    start = {word: jnp.asarray(row) for word, row in rows.items()}
    keys = image_keys_at(key, jnp.int32(0), BATCH)
    losses = {}
    for weighting, gamma in (("constant", None), ("min_snr", 5.0)):
        loss_fn = jax.jit(make_inversion_loss(model, list(rows), weighting))
        losses[weighting] = float(loss_fn(start, put_batch(batch, make_mesh(1)), keys, params))
        expected = twin.loss(batch, *draws(key, 0, batch.mean.shape[1:]), gamma=gamma).item()
        np.testing.assert_allclose(losses[weighting], expected, rtol=1e-5)
    assert losses["min_snr"] < 0.9 * losses["constant"]


def test_eight_devices_take_the_step_of_one(world):
    _, model, params, rows, batch_at, *_ = world
    found = []
    for devices in (1, 8):
        mesh = make_mesh(devices)
        optimizer = optax.adam(LEARNING_RATE)
        state = create_state({word: jnp.asarray(row) for word, row in rows.items()}, optimizer, jax.random.key(0), mesh)
        step = make_train_step(make_inversion_loss(model, list(rows)), optimizer, mesh, 0.9, frozen=params)
        state, _ = step(state, put_batch(batch_at(0), mesh))
        found.append(jax.tree.map(np.asarray, state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_saved_words_open_in_diffusers_and_draw_the_same_pictures(world, tmp_path):
    theirs, _, params, rows, *_ = world
    moved = {word: row + 0.1 * np.arange(len(row), dtype=np.float32)[:, None] for word, row in rows.items()}
    folder = str(theirs.config._name_or_path)
    fresh = StableDiffusionPipeline.from_pretrained(folder)
    fresh.set_progress_bar_config(disable=True)
    for path in write_learned_apart(tmp_path / "learned_embeds.safetensors", moved):
        fresh.load_textual_inversion(path)
    write_learned(tmp_path / "learned_embeds.safetensors", moved)
    settings = LatentModelSettings(folder, embeddings=(tmp_path / "learned_embeds.safetensors",))
    drawing = prepare(settings, PictureSettings(num_steps=4, batch_size=1), make_mesh(1))
    prompt = "a photo of <one> in the style of <two>"
    expected = fresh.encode_prompt(prompt, "cpu", 1, False)[0].detach().numpy()
    np.testing.assert_allclose(drawing.encode(np.stack(drawing.tokenize([prompt]))), expected, rtol=0, atol=1e-5)

    x_T = starting_noise(jax.random.key(0)[None], drawing.model.latent_shape(32, 32))
    latents = torch.from_numpy(np.array(x_T).transpose(0, 3, 1, 2))
    wanted = fresh(prompt, num_inference_steps=4, latents=latents, output_type="np").images
    texts = [jnp.asarray(text)[None] for text in drawing.encode(np.stack(drawing.tokenize([prompt, ""])))]
    sampler = make_latent_sampler(drawing.model, drawing.process, 7.5, drawing.mesh)
    sampled = sampler(drawing.params["unet"], x_T, jax.random.key(0)[None], *texts)
    found = decode_latents(drawing.model, drawing.params, sampled.latents)
    np.testing.assert_allclose(np.clip(np.asarray(found) / 2 + 0.5, 0, 1), wanted, rtol=0, atol=1e-4)
    assert float(wanted.std()) > 0.05

    table = get_leaf(params, TABLE)
    np.testing.assert_array_equal(get_leaf(first_rows(drawing.params, len(table)), TABLE), table)


def test_rows_follow_the_tokens_of_a_table_that_has_more(world, tmp_path):
    theirs, *_, concepts = world
    padded = StableDiffusionPipeline.from_pretrained(theirs.config._name_or_path)
    size = len(padded.tokenizer)
    padded.text_encoder.resize_token_embeddings(size + 5, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    settings = InversionSettings(size=32, batch_size=2, kv_learning_rate=1e-5)
    parts = prepare_inversion(concepts[:1], LatentModelSettings(str(tmp_path / "padded")), settings, make_mesh(1))
    (number,) = parts.drawing.tokenizer(["<one>"]).input_ids[0][1:-1]
    assert number == size
    rows = {name: leaf + 1 for name, leaf in parts.state.params.items()}
    table = get_leaf(with_trained(parts.frozen, rows, ["<one>"]), TABLE)
    np.testing.assert_array_equal(table[number], rows["<one>"][0])
    assert table.shape == get_leaf(parts.drawing.params, TABLE).shape
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "padded")
    assert parts.base == base_hash(params, pipeline.tokenizer.vocab_size)


def test_the_loss_by_timestep_is_the_mean_over_given_timesteps(world):
    theirs, model, params, rows, batch_at, *_ = world
    mesh = make_mesh(1)
    words = {word: jnp.asarray(row) for word, row in rows.items()}
    check = make_check(model, list(rows), params, batch_at, lambda rows: rows, mesh)
    found = check(words)
    bands = band_names(1000)
    assert list(bands.values()) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    # The same in torch, with the random numbers of each picture's key.
    twin = Twin(StableDiffusionPipeline.from_pretrained(theirs.config._name_or_path), rows)
    batch = batch_at(0)
    for name, (low, high) in bands.items():
        z, t, eps = draws(jax.random.key(0), 0, batch.mean.shape[1:], low, high)
        assert ((t >= low) & (t < high)).all()
        with torch.no_grad():
            np.testing.assert_allclose(float(found[name]), twin.loss(batch, z, t, eps).item(), rtol=1e-4)
    np.testing.assert_allclose(found["validation_loss"], np.mean([float(found[name]) for name in bands]), rtol=1e-6)
    assert {name: float(value) for name, value in check(words).items()} == {n: float(v) for n, v in found.items()}
    moved = check({word: row[:, ::-1] for word, row in words.items()})
    assert all(float(moved[name]) != float(found[name]) for name in bands)


def test_crops_are_squares_of_the_pictures_that_come_after_them(tmp_path):
    # Red tells the column, green the row, so that a crop shows where it was cut.
    side = np.arange(0, 240, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(side, side[:200]), np.zeros((200, 240), np.uint8)], axis=-1)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    concept = parse_concept(f"<new>:{tmp_path}:cat")
    whole, views = (read_concept_pictures(concept, 50, crops, seed=1).pixels for crops in (0, 3))
    assert views.shape == (8, 50, 50, 3)
    np.testing.assert_array_equal(views[:2], whole)
    np.testing.assert_array_equal(views, read_concept_pictures(concept, 50, 3, seed=1).pixels)
    corners = []
    for crop in views[2:].astype(int):
        wide, high = crop[25, -1, 0] - crop[25, 0, 0], crop[-1, 25, 1] - crop[0, 25, 1]
        assert abs(wide - high) <= 4
        assert 0.7 * 200 - 8 <= wide <= 200
        corners.append((crop[0, 0, 0], crop[0, 0, 1], wide))
    assert len(set(corners)) == 6


def test_masks_are_cut_and_mirrored_as_their_pictures(tmp_path):
    # The picture is its own mask, so that each place of one must say what the other does.
    rng = np.random.default_rng(0)
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        pixels = np.repeat(rng.integers(0, 256, (40, 50, 1), np.uint8), 3, axis=-1)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{name}.png")
    concept = parse_concept(f"<new>:{tmp_path / 'pictures'}:cat")
    found = read_concept_pictures(concept, 16, 2, 0, tmp_path / "masks").with_mirror_images()
    assert found.whole == 2
    assert found.pixels.shape == (12, 16, 16, 3)
    np.testing.assert_allclose(found.masks, found.pixels[..., 0] / 255, atol=1e-6)
    np.testing.assert_array_equal(found.pixels[6:], found.pixels[:6, :, ::-1])
    small = shrink_masks(found.masks, 4)
    np.testing.assert_allclose(small[3, 1, 2], found.masks[3, 4:8, 8:12].mean(), rtol=1e-5)
    for wrong, sentence in ((np.zeros((40, 50, 3), np.uint8), "black"), (pixels[1:], "50x39 instead of 50x40")):
        Image.fromarray(wrong).save(tmp_path / "masks" / "b.png")
        with pytest.raises(InputError, match=sentence):
            read_concept_pictures(concept, 16, 0, 0, tmp_path / "masks")


def test_a_mask_shows_some_of_every_square_or_is_refused(tmp_path):
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (120, 40), "gray").save(tmp_path / "pictures" / "a.png")
    concept = parse_concept(f"<new>:{tmp_path / 'pictures'}:cat")

    def read(mask):
        mask.save(tmp_path / "masks" / "a.png")
        return read_concept_pictures(concept, 16, 20, 0, tmp_path / "masks").masks

    mask = Image.new("RGB", (120, 40))
    mask.paste("white", (40, 0, 50, 40))
    assert read(mask).any(axis=(1, 2)).all()
    aside = Image.new("RGB", (120, 40))
    aside.paste("white", (0, 0, 20, 40))
    with pytest.raises(InputError, match=r"all that it shows of a\.png lies outside the square in the middle"):
        read(aside)
    cut_out = Image.new("RGBA", (120, 40), "white")
    cut_out.putalpha(mask.getchannel("R"))
    with pytest.raises(InputError, match="transparent in places; it must be white where its picture counts"):
        read(cut_out)


def test_batches_are_pure_functions_of_the_step(world):
    *_, batch_at, _, concepts = world
    jax.tree.map(np.testing.assert_array_equal, batch_at(7), batch_at(7))
    assert np.abs(batch_at(7).mean - batch_at(8).mean).max() > 0
    texts = {tuple(row) for step in range(60) for row in batch_at(step).input_ids.tolist()}
    assert len(texts) == sum(len(TEMPLATES[concept.kind]) for concept in concepts)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<new>", "must be <word>:FOLDER:initialiser"),
        ("<new>:folder", "must be <word>:FOLDER:initialiser"),
        ("<a b>:folder:dog", "the word '<a b>' holds a space"),
        (":folder:dog", "must be <word>:FOLDER:initialiser"),
    ],
)
def test_concepts_that_cannot_be_read(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_concept(text)


def test_texts_from_a_file(tmp_path):
    concepts = [parse_concept("<a>:x:dog"), parse_concept("<b>:x:dog:style")]
    (tmp_path / "texts").write_text("one {}\n\ntwo {} {}\n")
    assert texts_of(concepts, [str(tmp_path / "texts")]) == [["one <a>", "two <a> <a>"], ["one <b>", "two <b> <b>"]]
    (tmp_path / "texts").write_text("none")
    with pytest.raises(InputError, match=r"the line 'none' has no {} for the word"):
        texts_of(concepts, [str(tmp_path / "texts")])


def test_objects_and_styles_have_texts_of_their_own(tmp_path):
    concepts = [parse_concept("<a>:x:dog"), parse_concept("<b>:x:painting:style")]
    for kind in ("object", "style"):
        (tmp_path / kind).write_text(f"{kind} {{}}\n")
    own = [f"{kind}:{tmp_path / kind}" for kind in ("object", "style")]
    assert texts_of(concepts, own) == [["object <a>"], ["style <b>"]]
    # A kind that is left out has the built-in ones.
    assert texts_of(concepts, own[1:]) == [texts_of(concepts)[0], ["style <b>"]]
    for twice in ([own[0], own[0]], [str(tmp_path / "style"), own[0]]):
        with pytest.raises(InputError, match="object: its words have templates already"):
            texts_of(concepts, twice)
    with pytest.raises(InputError, match="no --concept is a style"):
        texts_of(concepts[:1], own)


def test_a_file_of_texts_may_be_called_as_a_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    concepts = [parse_concept("<a>:x:dog"), parse_concept("<b>:x:painting:style")]
    for name in ("style", "style:x", "x"):
        (tmp_path / name).write_text(f"{name} {{}}\n")
    for name in ("style", "style:x"):  # what is there counts as it stands
        assert texts_of(concepts, [name]) == [[f"{name} <a>"], [f"{name} <b>"]]
    (tmp_path / "style:x").unlink()
    assert texts_of(concepts, ["style:x"])[1] == ["x <b>"]


def test_folders_without_pictures_are_refused(tmp_path):
    concept = parse_concept(f"<new>:{tmp_path}:dog")
    with pytest.raises(InputError, match="holds no picture to learn from"):
        read_concept_pictures(concept, 16)
    (tmp_path / "a.png").write_bytes(b"nothing")
    Image.new("RGB", (5, 5)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"the first of 2 that cannot be read is a\.png"):
        read_concept_pictures(concept, 16)
    with pytest.raises(InputError, match="no such folder"):
        read_concept_pictures(parse_concept("<new>:/nowhere:dog"), 16)
