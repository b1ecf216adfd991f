"""The Stable Diffusion that the flags name: its networks, its parameters, its learned words, and what it would take."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdiff.errors import InputError
from jaxdiff.io.adapters import of_all, read_adapter
from jaxdiff.io.cache import cache_folder
from jaxdiff.io.learned_embeddings import Learned, read_learned
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import round_up, split_large
from jaxdiff.recipes.custom_diffusion import read_adapters, words_of
from jaxdiff.recipes.embedding_adjustment import adjust_words
from jaxdiff.recipes.learned_words import add_words, words_said
from jaxdiff.recipes.memory import Sizes, estimate_memory
from jaxdiff.recipes.merging import with_adapters
from jaxdiff.recipes.pipeline_folder import read_models
from jaxdiff.recipes.pretrained_pipeline import FlaxStableDiffusionPipeline
from jaxdiff.recipes.stable_diffusion import (
    Params,
    StableDiffusion,
    choose_attention,
    decode_latents,
    make_latent_sampler,
    make_process,
    own_sampler,
)
from jaxdiff.recipes.text_to_image import TextToImage
from jaxdiff.recipes.tiny_stable_diffusion import make_tiny, tiny_models
from jaxdiff.recipes.tiny_world import TINY_WORLD, tiny_world_folder, tiny_world_models
from jaxdiff.recipes.value_adapters import with_value_adapters
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

TINY = "tiny"
TINY_NOTE = "The weights of `tiny` are random: its pictures are noise, and only prove that everything runs."


def default_dtype(settings: LatentModelSettings) -> str:
    """Return the type that text encoder and UNet compute in on this machine."""
    return settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def prepare(
    settings: LatentModelSettings,
    pictures: PictureSettings,
    mesh: Mesh,
    learn: Callable[[Params, CLIPTokenizer, Learned], Learned] = lambda params, tokenizer, learned: {},
) -> TextToImage:
    """Read the model and everything that belongs to it.

    Args:
      settings: which model.
      pictures: how it draws.
      mesh: devices that share a batch.
      learn: from parameters and tokenizer, both with the learned words of files, and those words, to more words.

    Raises:
      InputError: files are missing, damaged or another model's, or a setting does not fit the model.
    """
    # From the configs alone, so that nothing large is read for what does not fit.
    _, structure = read_structure(settings)
    process = make_process(structure, pictures.sampler, pictures.num_steps, pictures.spacing, pictures.eta)
    size = picture_size(structure, pictures)
    dtype = default_dtype(settings)
    note = TINY_NOTE if settings.model == TINY else ""
    if settings.model == TINY:
        pipeline, params = make_tiny(dtype, settings.decode_dtype)
        print(note)
    else:
        name = str(tiny_world_folder(cache_folder(), mesh)) if settings.model == TINY_WORLD else settings.model
        pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
            name,
            revision=settings.revision,
            dtype=dtype,
            decode_dtype=settings.decode_dtype,
            sampler=pictures.sampler,
        )
    adapters = read_adapters(settings.adapters, params, pipeline.tokenizer.vocab_size)
    learned = add_learned(read_all_learned(settings), words_of(adapters), "--adapters")
    angle = 0.2 if settings.adjust_angle is None else settings.adjust_angle
    norm = 1.0 if settings.adjust_norm is None else settings.adjust_norm
    learned = adjust_words(learned, settings.adjust, angle, norm, params, pipeline.tokenizer)
    adjusted = {"adjust": list(settings.adjust), "adjust_angle": angle, "adjust_norm": norm} if settings.adjust else {}
    model, params = add_words(pipeline.model, params, pipeline.tokenizer, learned)
    params = with_adapters(model, params, pipeline.tokenizer, adapters, settings.captions)
    model, params = with_value_adapters(model, params, pipeline.tokenizer, adapters)
    for word, rows in learned.items():
        print(f"{word}: a learned word of {len(rows)} vector{'s' if len(rows) > 1 else ''}")
    more = learn(params, pipeline.tokenizer, learned)
    model, params = add_words(model, params, pipeline.tokenizer, more)
    learned = learned | more
    print(pipeline.attention)
    return TextToImage(
        model,
        jax.device_put(params, split_large(params, mesh)),
        pipeline.tokenizer,
        learned,
        process,
        size,
        pictures,
        {**describe_settings(pictures, model, pipeline.tokenizer, size, tree_hash(params)), **adjusted},
        mesh,
        note,
    )


def read_all_learned(settings: LatentModelSettings) -> Learned:
    """Return the learned words of all files.

    Raises:
      InputError: a file cannot be read, or a word comes twice.
    """
    learned: Learned = {}
    for path in settings.embeddings:
        learned = add_learned(learned, read_learned(path), f"--embeddings {path}")
    return learned


def check_said(settings: LatentModelSettings, texts: Sequence[str], new: Learned | None = None) -> None:
    """Raise InputError where words of a file or of --adjust change nothing, because no text says them.

    An adapter with matrices for all words changes every picture, so of such a one this is only printed.

    Args:
      settings: name the files.
      texts: all that are encoded.
      new: words that are being learned, which the tokenizer finds too.
    """
    of_files = {path: read_learned(path) for path in settings.embeddings}
    adapters = {}
    for path in settings.adapters:
        adapter = read_adapter(path)
        adapters[path] = adapter.words, bool(of_all(adapter.deltas))
    adjusted = [text.rsplit(":", 1)[0] for text in settings.adjust]
    known: dict[str, Any] = dict.fromkeys(adjusted, (None,)) | dict(new or {})
    for words in (*of_files.values(), *(words for words, _ in adapters.values())):
        known |= words
    said = {word for text in texts for word in words_said(text, known)}
    for path, words in of_files.items():
        if not said & words.keys():
            raise InputError(
                f"--embeddings {path}: no prompt says {name_some(words)}, which is what the file holds: "
                "say it, or drop the file"
            )
    for path, (words, for_all) in adapters.items():
        if not said & words.keys():
            missing = f"--adapters {path}: no prompt says {name_some(words)}"
            if not for_all:
                raise InputError(f"{missing}, and it changes nothing else: say it, or drop the file")
            print(f"{missing}; its matrices change the pictures nevertheless")
    for word in adjusted:
        if word not in said:
            raise InputError(f"--adjust: no prompt says {word!r}: say it, or drop it from --adjust")


def name_some(words: Collection[str]) -> str:
    """Return a few words for a message."""
    return " or ".join(map(repr, list(words)[:3])) + (f" or {len(words) - 3} more" if len(words) > 3 else "")


def add_learned(learned: Learned, more: Learned, what: str) -> Learned:
    """Return both; raise InputError, which begins with `what`, where a word comes twice."""
    if twice := sorted(more.keys() & learned.keys()):
        raise InputError(f"{what}: {twice[0]} is in another file too")
    return learned | more


def picture_size(model: StableDiffusion, pictures: PictureSettings) -> tuple[int, int]:
    """Return height and width in pixels, having checked that they fit the model."""
    size = pictures.height or model.default_size, pictures.width or model.default_size
    model.latent_shape(*size)
    return size


def describe_settings(
    pictures: PictureSettings, model: StableDiffusion, tokenizer: CLIPTokenizer, size: tuple[int, int], sha256: str
) -> Mapping[str, Any]:
    """Return all that decides the pixels of a picture, save its prompt and its number."""
    sampler = pictures.sampler or own_sampler(model)
    defaults = model.defaults[sampler]
    configs = model.text_encoder.config, model.unet.config, model.autoencoder.config, model.diffusion, defaults
    return {
        "sha256": sha256,
        "configs": hashlib.sha256(repr(configs).encode()).hexdigest(),
        "tokenizer": tokenizer.digest,
        "dtype": jnp.dtype(model.unet.dtype).name,
        "decode_dtype": jnp.dtype(model.autoencoder.dtype).name,
        "negative": pictures.negative,
        "num_steps": pictures.num_steps,
        "guidance_scale": pictures.guidance_scale,
        "sampler": sampler,
        "spacing": pictures.spacing or defaults.spacing,
        "eta": pictures.eta or 0.0,
        "height": size[0],
        "width": size[1],
        "long_prompts": pictures.long_prompts,
        "seed": pictures.seed,
    }


def estimate_drawing(settings: LatentModelSettings, pictures: PictureSettings, mesh: Mesh) -> Sizes:
    """Return what a device would hold while it draws; only configs are read."""
    model, params = read_shapes(settings)
    return estimate_memory(params, drawing_programs(model, params, pictures, mesh))


def read_structure(settings: LatentModelSettings) -> tuple[dict[str, Any], StableDiffusion]:
    """Return the networks by name, without parameters, and the whole; only configs are read."""
    dtype = default_dtype(settings)
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": settings.decode_dtype}
    if settings.model == TINY:
        return tiny_models(dtypes)
    if settings.model == TINY_WORLD:
        return tiny_world_models(dtypes)
    return read_models(settings.model, settings.revision, dtypes)


def read_shapes(settings: LatentModelSettings) -> tuple[StableDiffusion, Params]:
    """Return the model and the shapes of its parameters; only configs are read."""
    models, model = read_structure(settings)
    params = {
        part: jax.tree.map(
            lambda leaf, dtype=found.dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), found.params_shape_tree
        )
        for part, found in models.items()
    }
    return choose_attention(model)[0], params


def drawing_programs(
    model: StableDiffusion, params: Params, pictures: PictureSettings, mesh: Mesh
) -> dict[str, jax.stages.Lowered]:
    """Return the programs that draw pictures, by what they do; `params` are shapes."""
    process = make_process(model, pictures.sampler, pictures.num_steps, pictures.spacing, pictures.eta)
    shape = model.latent_shape(*picture_size(model, pictures))
    batch = round_up(pictures.batch_size, mesh)
    latents = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    text = model.text_encoder.config
    context, nothing = (
        jax.ShapeDtypeStruct((count, text.max_position_embeddings, text.hidden_size), jnp.float32)
        for count in (batch, 1)
    )
    sampler: Any = make_latent_sampler(model, process, pictures.guidance_scale, mesh)
    decoder = jax.jit(lambda params, latents: decode_latents(model, params, latents))
    at_once = f"{batch} pictures at once"
    return {
        f"sampling, {at_once}": sampler.lower(params["unet"], latents, keys, context, nothing),
        f"decoding, {at_once}": decoder.lower(params, latents),
    }
