"""CLIP beside transformers' PyTorch: image and text encoding of ViT-B/32 and ViT-L/14, and whole folders of pictures.

Both sides read the same random weights from one folder that transformers' CLIPModel writes, and their embeddings are
compared first. On a CPU both compute in float32; where JAX has an accelerator, jaxdiff alone is measured, in bfloat16,
against the matrix product peak of the same run.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Settings, Task, bfloat16_peak, measure, seconds_of

CONTEXT = 77
BEGIN, END = 49406, 49407
PIPELINE_BATCH = 32


@dataclass(frozen=True)
class Clip(Settings):
    """Time CLIP's encoders, ViT-B/32 and ViT-L/14, and the way from small PNG files to embeddings."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Images encoded at once."""
    texts: int = 32
    """Prompts of 77 tokens encoded at once."""
    l14_layers: int = 24
    """Vision layers of ViT-L/14; fewer make a shorter run of the same kind of work, 0 leaves the model out."""
    pictures: int = 2500
    """PNG files of the whole pipeline, 0 leaves it out."""
    pipeline_repeats: int = 3
    """Times that each side works through all files; the median counts."""
    seed: int = 0
    """Seed of the random weights, pixels and pictures."""


def compare(config: Clip) -> dict[str, Any]:
    """Run the whole comparison and return its figures under flat names."""
    import jax

    if jax.default_backend() != "cpu":
        return on_accelerator(config)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, layers in (("b32", 12), ("l14", config.l14_layers)):
            if layers:
                folder = Path(place) / name
                twin, model = write_and_read(name, layers, folder, config.seed)
                results |= compare_encoders(name, twin, model, config)
                del twin, model
        if config.pictures:
            results |= compare_pipeline(Path(place), config)
    return results


def clip_config(name: str, vision_layers: int) -> dict[str, Any]:
    """Return what transformers' CLIPConfig takes for one of the two models that OpenAI published."""
    ends = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    if name == "b32":
        return {"text_config": ends, "vision_config": {"num_hidden_layers": vision_layers}, "projection_dim": 512}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    return {
        "text_config": text | ends,
        "vision_config": vision | {"num_hidden_layers": vision_layers},
        "projection_dim": 768,
    }


def write_and_read(name: str, vision_layers: int, folder: Path, seed: int) -> tuple[Any, Any]:
    """Write random weights with transformers, and read them on both sides."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from jaxdiff import FlaxCLIPModel

    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(**clip_config(name, vision_layers))).save_pretrained(folder)
    return CLIPModel.from_pretrained(folder).eval(), FlaxCLIPModel.from_pretrained(folder)


def compare_encoders(name: str, twin: Any, model: Any, config: Clip) -> dict[str, Any]:
    """Time image encoding at every batch size, and text encoding."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    rng = np.random.default_rng(config.seed)
    results: dict[str, Any] = {}
    layers = model.config.vision_config.num_hidden_layers
    print(f"{name}: ViT-{'B/32' if name == 'b32' else 'L/14'}, {layers} vision layers, float32")
    for batch in config.batch_sizes:
        pixels = rng.standard_normal((batch, 3, 224, 224), np.float32)
        ours, theirs = jnp.asarray(pixels), torch.from_numpy(pixels)
        results |= compare_calls(
            f"{name}.image.{batch}",
            lambda ours=ours: model.get_image_features(ours),
            lambda theirs=theirs: twin.get_image_features(theirs).pooler_output,
            batch,
            config.repeats,
        )
    ids = rng.integers(0, BEGIN, (config.texts, CONTEXT))
    ids[:, 0], ids[:, -1] = BEGIN, END
    ours, theirs = jnp.asarray(ids), torch.from_numpy(ids)
    results |= compare_calls(
        f"{name}.text.{config.texts}",
        lambda: model.get_text_features(ours),
        lambda: twin.get_text_features(theirs).pooler_output,
        config.texts,
        config.repeats,
    )
    return results


def compare_calls(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], number: int, repeats: int
) -> dict[str, Any]:
    """Check that both sides give the same embeddings, time them in turn, print and return the rates."""
    import torch

    def in_torch() -> Any:
        with torch.inference_mode():
            return theirs()

    difference = largest_difference(ours(), in_torch().numpy())
    tasks = [Task("jaxdiff", lambda: ours().block_until_ready(), number), Task("eager", in_torch, number)]
    rates = measure(tasks, repeats)
    return report(name, rates, difference)


def largest_difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of embeddings of length 1.

    Raises:
      SystemExit: the sides do not compute the same.
    """
    import numpy as np

    one, other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (np.asarray(ours), np.asarray(theirs)))
    difference = float(np.abs(one - other).max())
    if not difference < 1e-4:
        raise SystemExit(f"the two sides' embeddings of length 1 differ by {difference:.1e}: nothing to compare")
    return difference


def report(name: str, rates: dict[str, float], difference: float) -> dict[str, Any]:
    """Print rates and their ratio, and return them under flat names."""
    ratio = rates["jaxdiff"] / rates["eager"]
    print(
        f"  {name:20s} jaxdiff {rates['jaxdiff']:8.2f}/s   eager {rates['eager']:8.2f}/s   ratio {ratio:.2f}   "
        f"largest difference {difference:.1e}",
        flush=True,
    )
    results = {f"{name}.per_second.{side}": rate for side, rate in rates.items()}
    return results | {f"{name}.ratio_to_eager": ratio, f"{name}.largest_difference": difference}


def compare_pipeline(place: Path, config: Clip) -> dict[str, Any]:
    """Time the way from PNG files to ViT-B/32 embeddings: what `jaxdiff.zeroshot` does, and a plain loop of torch."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPModel

    from jaxdiff.io.labelled_images import LabelledImages
    from jaxdiff.io.preprocess import Preprocessor
    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.clip_features import Encoder, encode_images
    from jaxdiff.recipes.pretrained import FlaxCLIPModel

    files = write_pictures(place / "pictures", config.pictures, config.seed)
    twin, processor = CLIPModel.from_pretrained(place / "b32").eval(), CLIPImageProcessorPil()
    tokenizer: Any = None  # no prompts here
    encoder = Encoder("b32", FlaxCLIPModel.from_pretrained(place / "b32"), Preprocessor(), tokenizer, make_mesh(1))
    images = LabelledImages([file.name for file in files], np.zeros(len(files), np.int32), ("any",), files)

    def ours() -> tuple[Any, float]:
        # Its seconds leave the compilation out, which a longer folder pays no more often.
        features = encode_images(encoder, images, PIPELINE_BATCH)
        return features.embeds, features.seconds

    def theirs() -> tuple[Any, float]:
        start, embeds = time.perf_counter(), []
        with torch.inference_mode():
            for first in range(0, len(files), PIPELINE_BATCH):
                pictures = [Image.open(file).convert("RGB") for file in files[first : first + PIPELINE_BATCH]]
                embeds.append(twin.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output)
        return torch.cat(embeds).numpy(), time.perf_counter() - start

    print(f"pipeline: {len(files):,} PNG files of 64 to 256 pixels a side, ViT-B/32, batches of {PIPELINE_BATCH}")
    seconds: dict[str, list[float]] = {"jaxdiff": [], "eager": []}
    for _ in range(config.pipeline_repeats):
        found = {}
        for side, call in (("jaxdiff", ours), ("eager", theirs)):
            found[side], spent = call()
            seconds[side].append(spent)
    rates = {side: len(files) / statistics.median(spent) for side, spent in seconds.items()}
    return report("b32.pipeline", rates, largest_difference(found["jaxdiff"], found["eager"]))


def write_pictures(folder: Path, number: int, seed: int) -> list[Path]:
    """Cut pictures of different sizes out of scikit-learn's two photographs, and return their files."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photos, rng = load_sample_images().images, np.random.default_rng(seed)
    files = []
    for index in range(number):
        photo, (height, width) = photos[index % len(photos)], rng.integers(64, 257, 2)
        top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
        files.append(folder / f"{index:05d}.png")
        Image.fromarray(photo[top : top + height, left : left + width]).save(files[-1])
    return files


def on_accelerator(config: Clip) -> dict[str, Any]:
    """Time image encoding in bfloat16 at growing batches, as a share of the matrix product peak."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.models.clip import CLIPVision
    from jaxdiff.models.clip_config import read_clip_config

    peak = bfloat16_peak()
    results: dict[str, Any] = {"peak_tflops": peak / 1e12}
    for name, layers in (("b32", 12), ("l14", config.l14_layers)):
        if not layers:
            continue
        vision = read_clip_config({"model_type": "clip", **clip_config(name, layers)}).vision_config
        module = CLIPVision(vision, True, jnp.bfloat16)
        params = jax.jit(module.init)(jax.random.key(config.seed), jnp.zeros((1, 224, 224, 3)))
        # Cast once: an encoder that only reads its parameters has no use for more digits than it computes with.
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        encode = jax.jit(lambda params, images, module=module: module.apply(params, images)[1])
        flops = matmul_flops(vision)
        for batch in (1, 8, 32, 64, 128, 256, 512):
            images = jax.random.normal(jax.random.key(batch), (batch, 224, 224, 3), jnp.bfloat16)
            rate = batch / seconds_of(functools.partial(encode, params, images), config.repeats)
            results[f"{name}.image.per_second.{batch}"] = rate
            results[f"{name}.image.share_of_peak.{batch}"] = rate * flops / peak
            print(f"{name}, bfloat16, batch {batch}: {rate:,.0f} images/s, {rate * flops / peak:.0%} of the peak")
    return results


def matmul_flops(vision: Any) -> float:
    """Return the operations of the matrix products of one image."""
    length, width = vision.num_positions, vision.hidden_size
    dense = 4 * width**2 + 2 * width * vision.intermediate_size
    layer = 2 * length * dense + 4 * length**2 * width
    patches = 2 * (length - 1) * vision.patch_size**2 * vision.num_channels * width
    return vision.num_hidden_layers * layer + patches + 2 * width * vision.projection_dim
