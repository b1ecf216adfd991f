"""Stable Diffusion from published files, under the name and with the calls of diffusers' last Flax pipeline.

    from jaxdiff import FlaxStableDiffusionPipeline
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4")
    images = pipeline(pipeline.prepare_inputs(["a photo of a cat"]), params, jax.random.key(0)).images

Old scripts that replicate `params` and give each device its own share of the prompts (`jit=True`) run as they are; new
ones need neither: the batch is split over all devices that it splits over. There is no safety checker: this is a tool
for research, and the published one both misses and blocks too much (arXiv 2210.04610).
"""

import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.hub import open_model
from jaxdiff.io.images import to_uint8
from jaxdiff.io.runs import write_json
from jaxdiff.io.strict_json import read_strict_json
from jaxdiff.io.tokenizer import TOKENIZER_FILES, CLIPTokenizer, read_tokenizer
from jaxdiff.mesh import batch_split, make_mesh, replicated
from jaxdiff.recipes.pipeline_folder import INDEX, SCHEDULER, describe_pipeline, read_models
from jaxdiff.recipes.pretrained import FlaxCLIPTextModel
from jaxdiff.recipes.pretrained_diffusion import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from jaxdiff.recipes.sampling import REVERSE_PROCESSES
from jaxdiff.recipes.stable_diffusion import (
    LatentSampler,
    Params,
    ReverseProcess,
    StableDiffusion,
    check_finite_latents,
    check_finite_pictures,
    choose_attention,
    decode_latents,
    encode_texts,
    make_latent_sampler,
    make_process,
    own_sampler,
)
from jaxdiff.settings import SamplerName

MOST_PROGRAMS = 8
"""Compiled samplers that are kept, one for each number of steps, guidance scale and mesh; the oldest goes first."""


class FlaxStableDiffusionPipelineOutput(NamedTuple):
    """Pictures in [0, 1], channels last; with a leading axis of devices where the prompts had one."""

    images: np.ndarray
    nsfw_content_detected: None = None


class FlaxStableDiffusionPipeline:
    """Text to image.

    Attributes:
      text_encoder: CLIP's text transformer, which holds no parameters, as the two below.
      unet: the network that is sampled.
      vae: the autoencoder.
      tokenizer: of prompts.
      model: the networks as jaxdiff's own functions take them.
      attention: which attention was chosen, and why.
      dtype: what the networks compute in.
    """

    def __init__(
        self,
        text_encoder: FlaxCLIPTextModel,
        unet: FlaxUNet2DConditionModel,
        vae: FlaxAutoencoderKL,
        tokenizer: CLIPTokenizer,
        model: StableDiffusion,
        files: dict[str, dict[str, Path]],
    ):
        """Use `from_pretrained`; `files` are those of tokenizer and scheduler, which are copied when it is saved."""
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self.model, self.attention = choose_attention(model)
        self.dtype = unet.dtype
        self._files = files
        self._placed: tuple[list[weakref.ref], bool, Mesh, Params] | None = None
        self._samplers: dict[Any, tuple[ReverseProcess, LatentSampler]] = {}
        self._encode = jax.jit(lambda params, ids: encode_texts(self.model, params, ids))
        self._decode = jax.jit(lambda params, latents: decode_latents(self.model, params, latents))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: DTypeLike = jnp.float32,
        decode_dtype: DTypeLike | None = None,
        sampler: SamplerName | None = None,
        from_pt: bool = False,
        variant: str | None = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        **options: Any,
    ) -> tuple["FlaxStableDiffusionPipeline", Params]:
        """Read a published pipeline.

        Args:
          name_or_path: OWNER/NAME on the Hugging Face hub, or a folder as diffusers writes it, with safetensors, .bin
            or Flax msgpack files; `python -m weights_convert stable_diffusion` makes one of a single file.
          revision: branch, tag or commit on the hub.
          dtype: what text encoder and UNet compute in, and the type of their parameters.
          decode_dtype: the same for the autoencoder; None means float32, because many of them overflow in float16.
          sampler: how to draw, with the settings that the published scheduler has; None means as published. It is not
            saved by `save_pretrained`, which copies the published file.
          from_pt: pass over msgpack files.
          variant: word before the ending of the networks' files, such as fp16; None means the plain files first.
          safety_checker: for the sake of old scripts, which give None; there is none.
          feature_extractor: the same.
          **options: cache_dir, token or local_files_only, as in huggingface_hub.

        Returns:
          The pipeline and its parameters, by network.

        Raises:
          InputError: files are missing, damaged or another model's, hold numbers too large for their type, or the hub
            cannot be reached; or an option or the sampler is not known.
        """
        if safety_checker is not None or feature_extractor is not None:
            raise InputError("safety_checker and feature_extractor must be None: jaxdiff has neither")
        name = str(name_or_path)
        dtypes = {"text_encoder": dtype, "unet": dtype, "vae": decode_dtype or jnp.float32}
        models, model = read_models(name, revision, dtypes, **options)
        if sampler is not None:
            if sampler not in REVERSE_PROCESSES:
                raise InputError(f"sampler={sampler!r}: must be one of {', '.join(REVERSE_PROCESSES)}")
            model = replace(model, sampler=sampler)
        own_sampler(model)  # known before anything large is read
        params = {}
        for part, network in models.items():
            fetch = open_model(name, revision, part, **options)
            params[part] = network.read_params(f"{name}/{part}", fetch, from_pt, variant, dtypes[part])
        tokenizer_files = open_model(name, revision, "tokenizer", **options)
        text = models["text_encoder"].config
        tokenizer = read_tokenizer(f"tokenizer: {name}", tokenizer_files, text.max_position_embeddings, text.vocab_size)
        scheduler = open_model(name, revision, "scheduler", **options)(SCHEDULER)
        assert scheduler is not None  # read above
        found = {file: path for file in TOKENIZER_FILES if (path := tokenizer_files(file))}
        files = {"tokenizer": found, "scheduler": {SCHEDULER: scheduler}}
        return cls(**models, tokenizer=tokenizer, model=model, files=files), params

    def save_pretrained(self, folder: str | Path, params: Params, safe_serialization: bool = True) -> None:
        """Write a folder that diffusers, and `from_pretrained`, open.

        Args:
          folder: made where it is missing.
          params: as `from_pretrained` gave them, or trained further.
          safe_serialization: write safetensors, which diffusers' torch pipeline reads, instead of Flax msgpack.

        Raises:
          InputError: the pipeline was not read from files.
        """
        if not self._files:
            raise InputError("a pipeline that was not read from files has no tokenizer's and scheduler's to save")
        folder = Path(folder)
        models = {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}
        for part, model in models.items():
            model.save_pretrained(folder / part, params[part], safe_serialization)
        for part, files in self._files.items():
            (folder / part).mkdir(exist_ok=True)
            for file, path in files.items():
                if path.resolve() != (folder / part / file).resolve():
                    shutil.copyfile(path, folder / part / file)
        scheduler = read_strict_json(folder / "scheduler" / SCHEDULER)
        if safe_serialization:
            scheduler["_class_name"] = scheduler["_class_name"].removeprefix("Flax")
            write_json(folder / "scheduler" / SCHEDULER, scheduler)
        index = describe_pipeline(scheduler["_class_name"], "" if safe_serialization else "Flax")
        write_json(folder / INDEX, index)

    def prepare_inputs(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Return the token ids of prompts, those that are too long cut, as diffusers does."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return self.tokenizer(prompts, truncate=True, length=self.tokenizer.context_length).input_ids

    def __call__(
        self,
        prompt_ids: ArrayLike,
        params: Params,
        prng_seed: jax.Array,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | ArrayLike = 7.5,
        latents: ArrayLike | None = None,
        neg_prompt_ids: ArrayLike | None = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> Any:
        """Draw one picture for each prompt.

        Args:
          prompt_ids: from `prepare_inputs`; with a leading axis of devices where `jit` is true.
          params: from `from_pretrained`, or those with a leading axis of devices where `jit` is true.
          prng_seed: key of the starting noise; one for each device where `jit` is true.
          num_inference_steps: steps of the published scheduler.
          height: in pixels; None means the size that the UNet was trained on.
          width: the same.
          guidance_scale: strength of classifier-free guidance; an array must hold the same number for all.
          latents: starting noise to use instead, channels second.
          neg_prompt_ids: what to avoid; None means the empty prompt.
          return_dict: return an object with `images` instead of a tuple.
          jit: inputs have a leading axis of devices, as `pmap` wants it. Everything is compiled in any case.

        Raises:
          InputError: a size that does not fit, latents of another shape or not finite, numbers of keys, prompts or
            guidance scales that do not fit each other, or pictures that are not finite.
        """
        scales = np.unique(np.asarray(guidance_scale, np.float64))
        if len(scales) != 1:
            raise InputError(f"guidance_scale: one number for all pictures is needed, got {scales.tolist()}")
        ids = jnp.asarray(prompt_ids)
        avoided = self.prepare_inputs([""]) if neg_prompt_ids is None else jnp.asarray(neg_prompt_ids)
        keys = [prng_seed]
        if jit:
            keys, ids = list(prng_seed), ids.reshape(-1, ids.shape[-1])
            avoided = avoided.reshape(-1, avoided.shape[-1])
        if len(avoided) not in (1, len(ids)):
            raise InputError(f"neg_prompt_ids: {len(avoided)} texts to avoid for {len(ids)} prompts; give 1 or as many")
        if len(ids) % len(keys):
            raise InputError(f"prng_seed: {len(keys)} keys for {len(ids)} prompts; each must serve equally many")
        size = self.model.default_size
        shape = self.model.latent_shape(height or size, width or size)
        share = (len(ids) // len(keys), shape[2], *shape[:2])
        if latents is None:
            noise = jnp.concatenate([jax.random.normal(key, share) for key in keys])
        else:
            noise = jnp.asarray(latents, jnp.float32).reshape(-1, *jnp.shape(latents)[-3:])
            if noise.shape != (len(ids), *share[1:]):
                raise InputError(f"latents: shape {noise.shape}, but these prompts need {(len(ids), *share[1:])}")
            if not np.isfinite(noise).all():
                raise InputError("latents: not all numbers are finite")
        mesh = make_mesh(max(n for n in range(1, jax.device_count() + 1) if len(ids) % n == 0))
        params = self._place(params, jit, mesh)
        each = [jax.random.split(jax.random.fold_in(_new_key(key), 1), share[0]) for key in keys]
        images = self._draw(
            params, ids, jnp.asarray(avoided), noise, jnp.concatenate(each), num_inference_steps, float(scales[0]), mesh
        )
        if jit:
            images = images.reshape(len(keys), -1, *images.shape[1:])
        return FlaxStableDiffusionPipelineOutput(images) if return_dict else (images, None)

    def _draw(self, params, ids, avoided, noise, keys, num_steps: int, guidance_scale: float, mesh: Mesh) -> np.ndarray:
        """Return pictures in [0, 1], each with a key of its own; they are split over the devices of the mesh."""
        setting = num_steps, guidance_scale, mesh
        if setting not in self._samplers:
            if len(self._samplers) == MOST_PROGRAMS:
                del self._samplers[next(iter(self._samplers))]
            process = make_process(self.model, None, num_steps)
            self._samplers[setting] = process, make_latent_sampler(self.model, process, guidance_scale, mesh)
        process, sampler = self._samplers[setting]
        put = batch_split(mesh)
        keys = jax.device_put(keys, put)
        x_T = jax.device_put(jnp.transpose(noise, (0, 2, 3, 1)), put)
        context = self._encode(params, jax.device_put(ids, put))
        nothing = self._encode(params, jax.device_put(avoided, replicated(mesh) if len(avoided) == 1 else put))
        sampled = sampler(params["unet"], x_T, keys, context, nothing)
        check_finite_latents(self.model, process, sampled)
        images = np.asarray(self._decode(params, sampled.latents))
        check_finite_pictures(self.model, images)
        return np.clip(images / 2 + 0.5, 0, 1)

    def _place(self, params: Params, stacked: bool, mesh: Mesh) -> Params:
        """Return the parameters on all devices; those of the last call are kept there for the next one.

        Args:
          params: of the networks.
          stacked: whether they have a leading axis of devices, of which the first counts.
          mesh: the devices.
        """
        leaves = jax.tree.leaves(params)
        if self._placed is not None:
            before, alike, where, placed = self._placed
            same = len(before) == len(leaves) and all(a() is b for a, b in zip(before, leaves))
            if same and alike == stacked and where == mesh:
                return placed
        self._placed = None  # first, so that two sets never lie beside each other
        one = jax.tree.map(lambda leaf: leaf[0], params) if stacked else params
        placed = jax.device_put(one, replicated(mesh))
        self._placed = [weakref.ref(leaf) for leaf in leaves], stacked, mesh, placed
        return placed

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Return pictures in [0, 1], with any leading axes, as Pillow's."""
        images = np.asarray(images)
        return [Image.fromarray(pixels) for pixels in to_uint8(images.reshape(-1, *images.shape[-3:]) * 2 - 1)]


def _new_key(key: jax.Array) -> jax.Array:
    """Return a key of `jax.random.PRNGKey` as one of `jax.random.key`."""
    return jax.random.wrap_key_data(key) if jnp.issubdtype(key.dtype, jnp.integer) else key
