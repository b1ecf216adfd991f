"""Pictures of many prompts: each prompt encoded once, each picture drawn once, whatever the batch and the devices.

Picture i of prompt p is a function of (seed, p, i) and the settings alone. Every file says how it was made; a file that
is there already and says the same is left as it is.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from jaxdiff.diffusion.samplers import Sampler, starting_noise
from jaxdiff.diffusion.timesteps import Walk
from jaxdiff.errors import InputError
from jaxdiff.io.images import read_image, read_png_texts, to_uint8, write_png
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import batch_split, replicated, round_up
from jaxdiff.recipes.learned_words import spell_out
from jaxdiff.recipes.sampling import in_batches
from jaxdiff.recipes.stable_diffusion import (
    Params,
    StableDiffusion,
    check_finite_latents,
    decode_latents,
    encode_texts,
    make_latent_sampler,
)
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.shapes import ImageKeys, PRNGKey
from jaxdiff.text2image_settings import PictureSettings

ABOUT = "jaxdiff"
"""Keyword of the text in a PNG file that says all that decides its pixels, as JSON."""
TEXTS_AT_ONCE = 8


class Job(NamedTuple):
    """One picture.

    Attributes:
      prompt: number of its text among all that are drawn.
      number: its own number under that text.
      file: its name below the folder.
      row: what its noise depends on beside its own number.
    """

    prompt: int
    number: int
    file: str
    row: int


@dataclass(frozen=True)
class TextToImage:
    """How every picture of a command is made.

    Attributes:
      tokenizer: of the model, learned words included.
      learned: those words.
      process: from `make_process`, as `timesteps`.
      size: height and width in pixels.
      settings: the flags.
      about: all that decides the pixels of a picture, save its prompt and its number.
    """

    model: StableDiffusion
    params: Params
    tokenizer: CLIPTokenizer
    learned: Learned
    process: Sampler
    timesteps: Walk
    size: tuple[int, int]
    settings: PictureSettings
    about: Mapping[str, Any]
    mesh: Mesh

    @cached_property
    def _encoder(self):
        encode = lambda params, ids: encode_texts(self.model, params, ids)  # noqa: E731
        return jax.jit(encode, out_shardings=replicated(self.mesh))

    @cached_property
    def _sampler(self):
        return make_latent_sampler(self.model, self.process, self.timesteps, self.settings.guidance_scale, self.mesh)

    @cached_property
    def _decoder(self):
        decode = lambda params, latents: decode_latents(self.model, params, latents)  # noqa: E731
        return jax.jit(decode, out_shardings=replicated(self.mesh))

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "N pieces L"]:
        """Return the token ids of texts, in as many pieces as the longest needs.

        Raises:
          InputError: a text is too long, and not to be taken in pieces.
        """
        texts = [spell_out(text, self.learned) for text in texts]
        if self.settings.long_prompts:
            return self.tokenizer.in_chunks(texts)
        length = self.tokenizer.context_length
        return self.tokenizer(texts, length=length, remedy="encode it in pieces by --long-prompts").input_ids[:, None]

    def encode(self, texts: Sequence[str], params: Params | None = None) -> Float[np.ndarray, "N S D"]:
        """Return the vectors of texts, all of one number of tokens; `params` are others than its own.

        Raises:
          InputError: as `tokenize`.
        """
        ids = self.tokenize(texts)
        rows = ids.reshape(-1, ids.shape[-1])
        batch = round_up(min(TEXTS_AT_ONCE, len(rows)), self.mesh)
        encoded = [
            np.asarray(self._encoder(params or self.params, part).astype(jnp.float32))[:count]
            for part, count in in_batches(rows, batch, self.mesh)
        ]
        return np.concatenate(encoded).reshape(len(ids), -1, encoded[0].shape[-1])

    def draw(
        self, jobs: Sequence[Job], prompts: Sequence[str], params: Params | None = None
    ) -> Iterator[tuple[Job, UInt8[np.ndarray, "H W 3"]]]:
        """Yield each job with its picture, batch by batch; `params` are others than its own.

        Raises:
          InputError: a prompt is too long, the numbers are not finite, or memory does not suffice.
        """
        *context, avoided = self.encode([*prompts, self.settings.negative], params)
        shape = self.model.latent_shape(*self.size)
        base = stream_key(self.settings.seed, Stream.SAMPLES)
        start = jax.jit(lambda numbers: _start(base, numbers, shape), out_shardings=batch_split(self.mesh))
        numbers = np.array([(job.row, job.number) for job in jobs], np.int32)
        left = list(jobs)
        for (pairs, texts), count in in_batches(
            (numbers, np.stack(context)[[job.prompt for job in jobs]]),
            round_up(min(self.settings.batch_size, len(jobs)), self.mesh),
            self.mesh,
        ):
            try:
                keys, x_T = start(pairs)
                sampled = self._sampler((params or self.params)["unet"], x_T, keys, texts, avoided[None])
                check_finite_latents(sampled)
                pixels = to_uint8(np.asarray(self._decoder(params or self.params, sampled.latents)))
            except jax.errors.JaxRuntimeError as error:
                raise out_of_memory(error, self.params, len(pairs)) or error from error
            yield from zip(left[:count], pixels)
            left = left[count:]


def _start(base: PRNGKey, numbers: Int[Array, "B 2"], shape: tuple[int, int, int]) -> tuple[ImageKeys, Array]:
    """Return key and noise of each picture, by the numbers of its row and of itself."""
    fold = jax.random.fold_in
    keys = jax.vmap(lambda pair: fold(fold(base, pair[0]), pair[1]))(numbers)
    return keys, starting_noise(keys, shape)


def make_jobs(prompts: Sequence[str], num_images: int) -> list[Job]:
    """Return one job for each picture of each prompt."""
    return [
        Job(prompt, number, f"{prompt:03d}_{number:03d}.png", row=prompt)
        for prompt in range(len(prompts))
        for number in range(num_images)
    ]


class Drawn(NamedTuple):
    """What `draw_missing` ends with.

    Attributes:
      pictures: prompt by prompt.
      new: how many were drawn now.
      timed: how many of them were drawn after the first batch, for which everything is compiled.
      seconds: the time that those took.
    """

    pictures: list[UInt8[np.ndarray, "H W 3"]]
    new: int
    timed: int
    seconds: float


def draw_missing(drawing: TextToImage, prompts: Sequence[str], jobs: Sequence[Job], folder: Path) -> Drawn:
    """Draw what the folder does not hold yet.

    Args:
      drawing: how.
      prompts: the texts.
      jobs: as many pictures of each text, text by text.
      folder: holds the PNG files.
    """
    texts = {job: describe(prompts[job.prompt], job.number, drawing.about) for job in jobs}
    old = {job for job in jobs if read_png_texts(folder / job.file).get(ABOUT) == texts[job][ABOUT]}
    new = [job for job in jobs if job not in old]
    if old:
        print(f"{len(old)} of {len(jobs)} pictures are there already")
    pictures: dict[Job, Any] = {job: read_image(folder / job.file) for job in old}
    first, timed = time.perf_counter(), 0
    if new:
        with progress_bar(len(jobs), "drawing", "image", initial=len(old)) as bar:
            for number, (job, pixels) in enumerate(drawing.draw(new, prompts)):
                if number == drawing.settings.batch_size - 1:
                    first, timed = time.perf_counter(), len(new) - number - 1
                write_png(folder / job.file, pixels, texts[job])
                pictures[job] = pixels
                bar.update()
    seconds = time.perf_counter() - first if timed else 0.0
    return Drawn([pictures[job] for job in jobs], len(new), timed, seconds)


def describe(prompt: str, number: int, about: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of one PNG file: the prompt, the settings as the web UIs write them, and all of it as JSON."""
    settings = f"Steps: {about['num_steps']}, Sampler: {about['sampler']}, CFG scale: {about['guidance_scale']}, "
    settings += f"Seed: {about['seed']}, Size: {about['width']}x{about['height']}, Model hash: {about['sha256'][:10]}"
    lines = [prompt, *([f"Negative prompt: {about['negative']}"] if about["negative"] else []), settings]
    everything = json.dumps({"prompt": prompt, "image": number, **about}, sort_keys=True)
    return {"parameters": "\n".join(lines), ABOUT: everything}


def out_of_memory(error: Exception, params: Params, batch: int) -> InputError | None:
    """Return the sentence about an error that was for want of memory, else None."""
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
        return None
    gigabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
    return InputError(
        f"out of memory with {batch} pictures at once beside {gigabytes:.1f} GB of weights: lower --batch-size, "
        "--height or --width, or use --dtype bfloat16; --dry-run prints an estimate"
    )
