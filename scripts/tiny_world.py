"""Try textual inversion in a small world: teach a Stable Diffusion of the embedded digits a digit it has no word for.

    python scripts/tiny_world.py --out runs/tiny_world

Trains the world once (kept in the cache folder), learns `<new1>` from five pictures of the digit whose name no caption
holds, with everything else frozen, and prints how many pictures a judge takes for that digit: with the learned word,
and with the word that it started from. Writes results.json and a grid of pictures into --out.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Config:
    """Flags."""

    steps: int = 600
    """Training steps of the word."""
    learning_rate: float = 2e-2
    """Of the word."""
    batch_size: int = 16
    """Pictures of a training step."""
    pictures: int = 100
    """Pictures judged of each text."""
    guidance_scale: float = 3.0
    """Of all pictures."""
    num_steps: int = 20
    """Sampling steps."""
    vectors: int = 1
    """Rows of the word."""
    seed: int = 0
    """Of the training and the noise."""
    out: Path = Path("runs/tiny_world")
    """Folder to write into."""


def main() -> int:
    """Run everything and print the figures."""
    config = tyro.cli(Config, description=__doc__)
    import numpy as np

    from jaxdiff import textual_inversion
    from jaxdiff.io.cache import cache_folder
    from jaxdiff.io.datasets import load_data
    from jaxdiff.io.digit_captions import CLASS_NAMES
    from jaxdiff.io.grids import labelled_grid
    from jaxdiff.io.images import write_png
    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.judge import prepare_judge, recognise
    from jaxdiff.recipes.text_to_image import make_jobs
    from jaxdiff.recipes.text_to_image_model import prepare
    from jaxdiff.recipes.tiny_world import UNKNOWN, UNSPOKEN, tiny_world_folder, unspoken_pictures
    from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

    started, mesh = time.perf_counter(), make_mesh(1)
    folder = tiny_world_folder(cache_folder(), mesh)
    print(f"world: {time.perf_counter() - started:.0f} s")
    judge, judged = prepare_judge(load_data("digits"), 600, 0, mesh, folder)
    begun = time.perf_counter()
    flags = {
        "model": "tiny-world",
        "train-steps": config.steps,
        "learning-rate": config.learning_rate,
        "batch-size": config.batch_size,
        "vectors-per-token": config.vectors,
        "seed": config.seed,
        "sample-every": config.steps,
        "sample-steps": config.num_steps,
        "guidance-scale": config.guidance_scale,
        "resume": "never",
        "devices": 1,
        "out": config.out / "inversion",
    }
    code = textual_inversion.main([f"--{name}={value}" for name, value in flags.items()])
    if code:
        return code
    print(f"word: {time.perf_counter() - begun:.0f} s")
    words = config.out / "inversion" / "learned_embeds.safetensors"
    settings = PictureSettings(
        guidance_scale=config.guidance_scale, num_steps=config.num_steps, seed=config.seed, batch_size=50
    )
    drawing = prepare(LatentModelSettings(str(folder), embeddings=(words,)), settings, mesh)
    text = "a photo of the digit {}."

    def share(word: str, wanted: int) -> tuple[float, np.ndarray]:
        drawn = drawing.draw(make_jobs([""], config.pictures), [text.replace("{}", word)])
        pixels = np.stack([picture for _, picture in drawn])
        return float((recognise(judge, pixels, mesh).classes == wanted).mean()), pixels

    figures, grid = {f"judge.{name}": value for name, value in judged.items()}, []
    for number, name in enumerate(CLASS_NAMES):
        if number != UNSPOKEN:
            figures[f"known.{name}"], pixels = share(name, number)
            grid.append((name, pixels[:10]))
    figures["known"] = float(np.mean([figures[f"known.{name}"] for name, _ in grid]))
    for name, word in (("initialiser", UNKNOWN), ("learned", "<new1>")):
        figures[name], pixels = share(word, UNSPOKEN)
        grid.append((word, pixels[:10]))
    grid.append(("learned from", np.concatenate([unspoken_pictures(5)] * 2)))
    for name in ("known", "initialiser", "learned"):
        print(f"{name}: {figures[name]:.1%} of {config.pictures} pictures a word")
    config.out.mkdir(parents=True, exist_ok=True)
    names = [str(number) for number in range(10)]
    pictures = np.concatenate([pixels for _, pixels in grid])
    write_png(config.out / "grid.png", labelled_grid(pictures, [name for name, _ in grid], names, text))
    (config.out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
