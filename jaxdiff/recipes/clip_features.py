"""Features of many pictures and many prompts: batched, split over the devices, decoded ahead of them."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from jaxdiff.errors import InputError
from jaxdiff.io.hub import open_model
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.io.preprocess import Preprocessor, read_preprocessor
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.provenance import tree_hash, versions
from jaxdiff.io.shards import Shards
from jaxdiff.io.tokenizer import CLIPTokenizer, read_tokenizer
from jaxdiff.io.weights import read_safetensors, write_safetensors
from jaxdiff.mesh import batch_split, device_name, put_batch, round_up, split_large
from jaxdiff.models.clip import normalize
from jaxdiff.processes import barrier, is_leader
from jaxdiff.recipes.pretrained import FlaxCLIPModel

AHEAD = 4
"""Batches that are decoded while the device works on one."""
TEXT_BATCH = 64
"""Prompts that are encoded at a time, or a few more where they do not split over the devices."""
LENGTH_STEP = 8
"""Prompts are padded to multiples of this many tokens, so that few programs are compiled."""


class Encoder(NamedTuple):
    """A CLIP with what belongs to it.

    Attributes:
      name: as the user gave it.
      model: the networks; the parameters lie on all devices.
      preprocessor: of pictures.
      tokenizer: of prompts.
      mesh: devices that share a batch.
    """

    name: str
    model: FlaxCLIPModel
    preprocessor: Preprocessor
    tokenizer: CLIPTokenizer
    mesh: Mesh


class ImageFeatures(NamedTuple):
    """What `encode_images` gives.

    Attributes:
      embeds: of length 1, one for each picture that could be read.
      kept: the numbers of those pictures.
      skipped: for each of the others, why.
      timed: number of pictures that were encoded just now, in this process.
      seconds: time from the first of their files to the last embedding, the compilation left out.
    """

    embeds: Float[np.ndarray, "N F"]
    kept: Int[np.ndarray, "N"]
    skipped: tuple[str, ...]
    timed: int
    seconds: float


def load_encoder(name: str, revision: str | None, dtype: Any, mesh: Mesh) -> Encoder:
    """Read a published model with its preprocessing and its tokenizer.

    Raises:
      InputError: files are missing, damaged or another model's, or the hub cannot be reached.
    """
    fetch = open_model(name, revision)
    model = FlaxCLIPModel.from_pretrained(name, revision=revision, dtype=dtype)
    model.params = jax.device_put(model.params, split_large(model.params, mesh))
    text, vision = model.config.text_config, model.config.vision_config
    return Encoder(
        name,
        model,
        read_preprocessor(name, fetch, vision.image_size),
        read_tokenizer(name, fetch, text.max_position_embeddings, text.vocab_size),
        mesh,
    )


def encode_images(encoder: Encoder, images: LabelledImages, batch_size: int) -> ImageFeatures:
    """Encode pictures in batches, the next ones decoded by threads while the device works.

    Raises:
      InputError: no picture can be read.
    """
    batch_size = round_up(min(batch_size, len(images.names)), encoder.mesh)
    encode = compile_encoder(encoder, batch_size)
    started = time.perf_counter()
    kept: list[int] = []
    skipped: list[str] = []
    embeds = []
    with progress_bar(len(images.names), "images", "image") as bar:
        for pixels, numbers, faults in decode_batches(encoder.preprocessor, images, in_chunks(images, batch_size)):
            kept += numbers
            skipped += faults
            if numbers:
                # Not waited for: the next batch is put together meanwhile.
                embeds.append(encode(pixels))
            bar.update(len(numbers) + len(faults))
        require_readable(images, kept, skipped)
        gathered = np.concatenate([np.asarray(part) for part in embeds])
    seconds = time.perf_counter() - started
    return ImageFeatures(gathered, np.array(kept), tuple(skipped), len(images.names), seconds)


def share_images(encoder: Encoder, images: LabelledImages, batch_size: int, folder: Path) -> ImageFeatures | None:
    """Encode pictures as `encode_images` does, but batch by batch into files, of which several processes make a share.

    Args:
      encoder: on this process's own devices.
      images: all pictures.
      batch_size: pictures at once.
      folder: of the files; those that an earlier call left are not made again.

    Returns:
      The features of all pictures to process 0, None to the others.

    Raises:
      InputError: no picture can be read.
    """
    batch_size = round_up(min(batch_size, len(images.names)), encoder.mesh)
    chunks = in_chunks(images, batch_size)
    shards = Shards(folder, lambda: sources_of(encoder, images, batch_size), len(chunks))
    missing = list(shards.missing())
    encode = compile_encoder(encoder, batch_size)
    started = time.perf_counter()
    batches = decode_batches(encoder.preprocessor, images, [chunks[number] for number in missing])
    timed = sum(len(chunks[number]) for number in missing)
    with progress_bar(timed, "images", "image") as bar:
        for number, (pixels, numbers, faults) in zip(missing, batches):
            lines = "".join(f"{fault}\n" for fault in faults)
            arrays = {"embeds": np.asarray(encode(pixels)), "kept": np.array(numbers, np.int64)}
            shards.write(number, {**arrays, "faults": np.frombuffer(lines.encode(), np.uint8)})
            bar.update(len(chunks[number]))
    seconds = time.perf_counter() - started
    barrier()
    if not is_leader():
        return None
    found = shards.read()
    skipped = found["faults"].tobytes().decode().splitlines()
    require_readable(images, found["kept"], skipped)
    return ImageFeatures(found["embeds"], found["kept"], tuple(skipped), timed, seconds)


def sources_of(encoder: Encoder, images: LabelledImages, batch_size: int) -> dict[str, Any]:
    """Return all that decides the features of pictures: the model, its preprocessing, and which pictures they are."""
    pictures = hashlib.sha256()
    for name, source in zip(images.names, images.sources):
        known = source.tobytes().hex() if isinstance(source, np.ndarray) else describe_file(source)
        pictures.update(json.dumps([name, known]).encode())
    return {
        "params": tree_hash(encoder.model.params),
        "dtype": str(jnp.dtype(encoder.model.dtype)),
        "preprocessor": encoder.preprocessor.to_dict(),
        "pictures": pictures.hexdigest(),
        "pictures_of_a_file": batch_size,
        "versions": versions(device_name(encoder.mesh)),
    }


def describe_file(path: Path) -> list[int]:
    """Return size and time of the last change; -1 where there is no such file."""
    try:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    except OSError:
        return [-1, -1]


def encoding_program(module: Any, table: Float[np.ndarray, "256 3"], mesh: Mesh) -> Any:
    """Return the program from parameters and pixels, uint8, to embeddings of length 1; `table` is a preprocessor's."""

    def encode(params: Any, pixels: UInt8[Array, "B H W 3"]) -> Float[Array, "B F"]:
        looked_up = normalize_pixels(pixels, table)
        return normalize(module.apply({"params": params}, looked_up, method=module.encode_image)[1])

    return jax.jit(encode, out_shardings=batch_split(mesh))


def compile_encoder(encoder: Encoder, batch_size: int) -> Callable[[UInt8[np.ndarray, "B H W 3"]], jax.Array]:
    """Return the compiled function from at most `batch_size` pictures to their embeddings, which it does not await."""
    mesh = encoder.mesh
    compiled = encoding_program(encoder.model.module, encoder.preprocessor.table, mesh)
    blank = np.zeros((batch_size, *encoder.preprocessor.crop, 3), np.uint8)
    compiled(encoder.model.params, put_batch(blank, mesh)).block_until_ready()

    def padded(pixels: UInt8[np.ndarray, "B H W 3"]) -> jax.Array:
        whole = np.concatenate([pixels, blank[len(pixels) :]]) if len(pixels) < batch_size else pixels
        return compiled(encoder.model.params, put_batch(whole, mesh))[: len(pixels)]

    return padded


def in_chunks(images: LabelledImages, batch_size: int) -> list[range]:
    """Return the numbers of the pictures of every batch."""
    total = len(images.names)
    return [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]


def require_readable(images: LabelledImages, kept: Sequence[int] | np.ndarray, skipped: Sequence[str]) -> None:
    """Raise InputError where no picture could be read."""
    if not len(kept):
        raise InputError(f"none of {len(images.names):,} pictures can be read; the first is {skipped[0]}")


def decode_batches(
    preprocessor: Preprocessor, images: LabelledImages, chunks: Sequence[range]
) -> Iterator[tuple[np.ndarray, list[int], list[str]]]:
    """Yield pixels, numbers of the pictures that could be read, and what was wrong with the others."""

    def decode(numbers: range) -> tuple[np.ndarray, list[int], list[str]]:
        loaded = [(number, images.load(number)) for number in numbers]
        good = [(number, preprocessor.cut(found)) for number, found in loaded if not isinstance(found, str)]
        faults = [found for _, found in loaded if isinstance(found, str)]
        pixels = np.stack([cut for _, cut in good]) if good else np.zeros((0, *preprocessor.crop, 3), np.uint8)
        return pixels, [number for number, _ in good], faults

    pool = ThreadPoolExecutor()
    try:
        waiting = [pool.submit(decode, chunk) for chunk in chunks[:AHEAD]]
        for number in range(len(chunks)):
            if number + AHEAD < len(chunks):
                waiting.append(pool.submit(decode, chunks[number + AHEAD]))
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


def normalize_pixels(
    pixels: UInt8[Array | np.ndarray, "B H W 3"], table: Float[np.ndarray, "256 3"]
) -> Float[Array, "B H W 3"]:
    """Look every pixel up in the table of its channel: the floats of `Preprocessor`, bit for bit, on any device."""
    index = jnp.asarray(pixels).astype(jnp.int32) * 3 + jnp.arange(3)[None, None, None]
    return jnp.asarray(table).reshape(-1)[index]


def encode_prompts(
    encoder: Encoder,
    prompts: Sequence[str],
    truncate: bool,
    cache: Path | None = None,
    remedy: str = "have it cut by --truncate",
) -> Float[np.ndarray, "P F"]:
    """Encode prompts, each of them once, or read what an earlier call kept.

    Args:
      encoder: from `load_encoder`.
      prompts: texts, some of them perhaps the same.
      truncate: whether prompts that are too long are cut instead of refused.
      cache: folder to keep the embeddings in, under the hash of all that they depend on.
      remedy: what the message about a prompt that is too long advises.

    Raises:
      InputError: a prompt is too long.
    """
    unique = list(dict.fromkeys(prompts))
    tokens = encoder.tokenizer(unique, truncate, remedy=remedy)
    place = None if cache is None else cache / f"{text_hash(encoder, *tokens)}.safetensors"
    if place is not None and place.is_file():
        embeds = read_safetensors(place)["text_embeds"]
    else:
        embeds = encode_tokens(encoder, tokens.input_ids, tokens.attention_mask)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(place, {"text_embeds": embeds})
    index = {prompt: number for number, prompt in enumerate(unique)}
    return embeds[[index[prompt] for prompt in prompts]]


def text_hash(encoder: Encoder, input_ids: np.ndarray, attention_mask: np.ndarray) -> str:
    """Return the hash of everything that decides text embeddings."""
    params = encoder.model.params
    parts = [tree_hash({name: params[name] for name in ("text_model", "text_projection")})]
    parts += [repr(encoder.model.config.text_config), str(jnp.dtype(encoder.model.dtype))]
    parts += [array.tobytes().hex() + repr(array.shape) for array in (input_ids, attention_mask)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def encode_tokens(encoder: Encoder, input_ids: np.ndarray, attention_mask: np.ndarray) -> Float[np.ndarray, "P F"]:
    """Return text embeddings of length 1."""
    module: Any = encoder.model.module
    mesh = encoder.mesh

    def encode(params: Any, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B F"]:
        return normalize(module.apply({"params": params}, ids, mask, method=module.encode_text)[1])

    compiled = jax.jit(encode, out_shardings=batch_split(mesh))
    limit = encoder.tokenizer.context_length
    length = min(-(-input_ids.shape[1] // LENGTH_STEP) * LENGTH_STEP, limit)
    number, batch = len(input_ids), round_up(min(TEXT_BATCH, len(input_ids)), mesh)
    # Whatever stands after the end of a text is masked; rows beyond the last one repeat it and are dropped.
    rows, columns = ((0, -number % batch), (0, 0)), ((0, 0), (0, length - input_ids.shape[1]))
    ids = np.pad(np.pad(input_ids, rows, "edge"), columns, constant_values=encoder.tokenizer.pad_id)
    mask = np.pad(np.pad(attention_mask, rows, "edge"), columns)
    embeds = [
        np.asarray(compiled(encoder.model.params, *put_batch((ids[i : i + batch], mask[i : i + batch]), mesh)))
        for i in range(0, len(ids), batch)
    ]
    return np.concatenate(embeds)[:number]
