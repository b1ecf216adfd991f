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

from jaxdiff.diffusion.samplers import starting_noise
from jaxdiff.errors import InputError
from jaxdiff.io.images import is_overview, read_png_texts, to_uint8, write_png
from jaxdiff.io.learned_embeddings import Learned
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import batch_split, put_batch, replicated, round_up
from jaxdiff.processes import barrier, own_share
from jaxdiff.recipes.learned_words import ids_of_words, spell_out
from jaxdiff.recipes.sampling import batch_numbers, in_batches
from jaxdiff.recipes.stable_diffusion import (
    Params,
    ReverseProcess,
    StableDiffusion,
    check_finite_latents,
    check_finite_pictures,
    decode_latents,
    encode_texts,
    make_latent_sampler,
)
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.shapes import ImageKeys, PRNGKey
from jaxdiff.text2image_settings import PictureSettings

ABOUT = "jaxdiff"
"""Keyword of the text in a PNG file that says all that decides its pixels, as JSON."""
GRID = "grid.png"
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
      process: from `make_process`.
      size: height and width in pixels.
      settings: the flags.
      about: all that decides the pixels of a picture, save its prompt and its number.
      note: what has to be said of its pictures, if anything.
    """

    model: StableDiffusion
    params: Params
    tokenizer: CLIPTokenizer
    learned: Learned
    process: ReverseProcess
    size: tuple[int, int]
    settings: PictureSettings
    about: Mapping[str, Any]
    mesh: Mesh
    note: str = ""

    @cached_property
    def _encoder(self):
        encode = lambda params, ids: encode_texts(self.model, params, ids)  # noqa: E731
        return jax.jit(encode, out_shardings=replicated(self.mesh))

    @cached_property
    def _sampler(self):
        return make_latent_sampler(self.model, self.process, self.settings.guidance_scale, self.mesh)

    @cached_property
    def _decoder(self):
        decode = lambda params, latents: decode_latents(self.model, params, latents)  # noqa: E731
        return jax.jit(decode, out_shardings=replicated(self.mesh))

    def pictures_at_once(self, jobs: int) -> int:
        """Return how many pictures are drawn at once where so many are to be drawn."""
        return round_up(min(self.settings.batch_size, jobs), self.mesh)

    def tokenize(
        self, texts: Sequence[str], remedy: str = "encode it in pieces by --long-prompts"
    ) -> list[Int[np.ndarray, "pieces L"]]:
        """Return the token ids of texts, each in as many pieces as it needs; `remedy` is for one that is too long.

        Raises:
          InputError: a text is too long, and not to be taken in pieces.
        """
        texts = [spell_out(text, self.learned) for text in texts]
        if self.settings.long_prompts:
            return self.tokenizer.in_chunks(texts, ids_of_words(self.tokenizer, self.learned))
        length = self.tokenizer.context_length
        ids = self.tokenizer(texts, length=length, remedy=remedy).input_ids
        return list(ids[:, None])

    def encode(self, ids: Int[np.ndarray, "N pieces L"], params: Params | None = None) -> Float[np.ndarray, "N S D"]:
        """Return the vectors of texts; `params` are others than its own."""
        rows = ids.reshape(-1, ids.shape[-1])
        encoded = [
            np.asarray(self._encoder(params or self.params, part).astype(jnp.float32))[:count]
            for part, count in in_batches(rows, round_up(TEXTS_AT_ONCE, self.mesh), self.mesh)
        ]
        return np.concatenate(encoded).reshape(len(ids), -1, encoded[0].shape[-1])

    def draw(
        self, jobs: Sequence[Job], prompts: Sequence[str], params: Params | None = None
    ) -> Iterator[tuple[Job, UInt8[np.ndarray, "H W 3"]]]:
        """Yield each job with its picture, batch by batch; `params` are others than its own.

        Jobs come in their order, but for prompts of more pieces, which come after those of fewer. A prompt is as many
        pieces as it, or what is to be avoided, needs; so its pictures do not depend on the other prompts.

        Raises:
          InputError: a prompt is too long, or the numbers are not finite.
        """
        *ids, avoided = self.tokenize([*prompts, self.settings.negative])
        by_pieces: dict[int, list[Job]] = {}
        for job in jobs:
            by_pieces.setdefault(max(len(ids[job.prompt]), len(avoided)), []).append(job)
        for pieces, alike in sorted(by_pieces.items()):
            texts = {job.prompt: self.tokenizer.fill(ids[job.prompt], pieces) for job in alike}
            yield from self._draw_alike(alike, texts, self.tokenizer.fill(avoided, pieces), params or self.params)

    def _draw_alike(
        self,
        jobs: Sequence[Job],
        texts: Mapping[int, Int[np.ndarray, "pieces L"]],
        avoided: Int[np.ndarray, "pieces L"],
        params: Params,
    ) -> Iterator[tuple[Job, UInt8[np.ndarray, "H W 3"]]]:
        """Yield each job with its picture, all texts in equally many pieces."""
        shape = self.model.latent_shape(*self.size)
        base = stream_key(self.settings.seed, Stream.SAMPLES)
        start = jax.jit(lambda numbers: _start(base, numbers, shape), out_shardings=batch_split(self.mesh))
        nothing = self.encode(avoided[None], params)
        context: dict[int, Float[np.ndarray, "S D"]] = {}
        for chosen, count in batch_numbers(len(jobs), self.pictures_at_once(len(jobs))):
            part = [jobs[number] for number in chosen]
            wanted = dict.fromkeys(job.prompt for job in part)
            if new := [prompt for prompt in wanted if prompt not in context]:
                context |= zip(new, self.encode(np.stack([texts[prompt] for prompt in new]), params))
            context = {prompt: context[prompt] for prompt in wanted}
            numbers = np.array([(job.row, job.number) for job in part], np.int32)
            pairs, vectors = put_batch((numbers, np.stack([context[job.prompt] for job in part])), self.mesh)
            keys, x_T = start(pairs)
            sampled = self._sampler(params["unet"], x_T, keys, vectors, nothing)
            check_finite_latents(self.model, self.process, sampled)
            images = np.asarray(self._decoder(params, sampled.latents))
            check_finite_pictures(self.model, images)
            yield from zip(part[:count], to_uint8(images))


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
      new: how many pictures were drawn now.
      timed: how many of them were drawn after the first batch, for which everything is compiled.
      seconds: the time that those took.
    """

    new: int
    timed: int
    seconds: float


def draw_missing(drawing: TextToImage, prompts: Sequence[str], jobs: Sequence[Job], folder: Path) -> Drawn:
    """Draw what the folder does not hold yet; of several processes each draws a share.

    Args:
      drawing: how.
      prompts: the texts.
      jobs: the pictures.
      folder: holds the PNG files.

    Raises:
      InputError: a picture or a grid of that name is there that is none of ours, see also `TextToImage.draw`.
    """

    def texts_of(job: Job) -> dict[str, str]:
        return describe(prompts[job.prompt], job.number, drawing.about)

    found = {job: texts for job in jobs if (texts := read_png_texts(folder / job.file)) is not None}
    if foreign := [job.file for job, texts in found.items() if ABOUT not in texts]:
        raise InputError(f"{folder / foreign[0]}: was not drawn by jaxdiff; move it away, or choose another --out")
    if (folder / GRID).is_file() and not is_overview(folder / GRID):
        raise InputError(f"{folder / GRID}: is no grid that jaxdiff drew; move it away, or choose another --out")
    new = [job for job in jobs if job not in found or found[job][ABOUT] != texts_of(job)[ABOUT]]
    if replaced := [job.file for job in new if job in found]:
        print(f"pictures of earlier runs that are replaced in {folder}: {len(replaced)}, such as {replaced[0]}")
    old = len(jobs) - len(new)
    barrier()  # else one process would find what another draws already
    own = [new[place] for place in own_share(len(new))]
    if old:
        print(f"{old} of {len(jobs)} pictures are there already")
    named = {job.file for job in jobs}
    others = [path for path in folder.glob("*.png") if path.name not in named and ABOUT in (read_png_texts(path) or ())]
    if others:
        print(f"pictures of earlier runs that stay in {folder}: {len(others)}, such as {min(others).name}")
    first, timed = time.perf_counter(), 0
    if own:
        with progress_bar(len(own), "drawing", "image") as bar:
            for number, (job, pixels) in enumerate(drawing.draw(own, prompts), 1):
                if number == drawing.pictures_at_once(len(own)):
                    first, timed = time.perf_counter(), len(own) - number
                write_png(folder / job.file, pixels, texts_of(job))
                bar.update()
    seconds = time.perf_counter() - first if timed > 0 else 0.0
    barrier()
    return Drawn(len(new), max(timed, 0), seconds)


def describe(prompt: str, number: int, about: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of one PNG file: the prompt, the settings as the web UIs write them, and all of it as JSON."""
    settings = f"Steps: {about['num_steps']}, Sampler: {about['sampler']}, CFG scale: {about['guidance_scale']}, "
    settings += f"Seed: {about['seed']}, Size: {about['width']}x{about['height']}, Model hash: {about['sha256'][:10]}"
    lines = [prompt, *([f"Negative prompt: {about['negative']}"] if about["negative"] else []), settings]
    everything = json.dumps({"prompt": prompt, "image": number, **about}, sort_keys=True)
    return {"parameters": "\n".join(lines), ABOUT: everything}
