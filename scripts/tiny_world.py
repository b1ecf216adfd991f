"""Try textual inversion in a small world: teach a Stable Diffusion of the embedded digits a digit it has no word for.

    python scripts/tiny_world.py --out runs/tiny_world

Trains the world once (kept in the cache folder). Learns `<new1>` from five pictures of the digit whose name no caption
holds, and `<new2>` from five pictures of digits in the street, as a style, each in a run of its own and with everything
else frozen. A judge, trained on real pictures, says how many pictures show what was asked for: with the names that the
world knows, with the words that learning starts from, with each learned word, and with both. Writes results.json and a
grid of pictures into --out.
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
    """Training steps of each word."""
    learning_rate: float = 2e-3
    """Of each word."""
    batch_size: int = 16
    """Pictures of a training step."""
    pictures: int = 400
    """Pictures judged of each text; a quarter of them for each of the nine names that the world knows."""
    guidance_scale: float = 3.0
    """Of all pictures."""
    num_steps: int = 20
    """Sampling steps."""
    vectors: int = 1
    """Rows of each word."""
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
    from jaxdiff.io.images import write_overview
    from jaxdiff.io.world_captions import STYLES, UNKNOWN, UNSPOKEN
    from jaxdiff.mesh import make_mesh
    from jaxdiff.recipes.judge import prepare_judge, recognise
    from jaxdiff.recipes.text_to_image import make_jobs
    from jaxdiff.recipes.text_to_image_model import prepare
    from jaxdiff.recipes.tiny_world import STYLE_PICTURES, STYLE_TEXTS, example_pictures, tiny_world_folder
    from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

    started, mesh = time.perf_counter(), make_mesh(1)
    folder = tiny_world_folder(cache_folder(), mesh)
    print(f"world: {time.perf_counter() - started:.0f} s")
    judge, figures = prepare_judge(load_data("digits"), 600, 0, mesh, folder)
    # The first is what the command learns when it is told nothing.
    style = [f"--concept=<new2>:{folder / STYLE_PICTURES}:{STYLES[0]}:style", f"--templates={folder / STYLE_TEXTS}"]
    words = []
    for name, concept in (("object", []), ("style", style)):
        begun, out = time.perf_counter(), config.out / name
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
            "out": out,
        }
        code = textual_inversion.main([*concept, *(f"--{flag}={value}" for flag, value in flags.items())])
        if code:
            return code
        figures[f"seconds.{name}"] = time.perf_counter() - begun
        words.append(out / "learned_embeds.safetensors")
    settings = PictureSettings(
        guidance_scale=config.guidance_scale, num_steps=config.num_steps, seed=config.seed, batch_size=50
    )
    drawing = prepare(LatentModelSettings(str(folder), embeddings=tuple(words)), settings, mesh)
    grid: list[tuple[str, np.ndarray]] = []

    def draw(text: str, label: str, number: int = config.pictures):
        drawn = drawing.draw(make_jobs([""], number), [text])
        pixels = np.stack([picture for _, picture in drawn])
        grid.append((label, pixels[:10]))
        return recognise(judge, pixels, mesh)

    plain, styled = "a photo of the digit {}.", "{} in the style of a {}."
    known = [number for number in range(10) if number != UNSPOKEN]
    for number in known:
        found = draw(plain.replace("{}", CLASS_NAMES[number]), CLASS_NAMES[number], max(10, config.pictures // 4))
        figures[f"known.{CLASS_NAMES[number]}"] = float((found.classes == number).mean())
    figures["known"] = float(np.mean([figures[f"known.{CLASS_NAMES[number]}"] for number in known]))
    for name, word in (("initialiser", UNKNOWN), ("learned", "<new1>")):
        figures[name] = float((draw(plain.replace("{}", word), word).classes == UNSPOKEN).mean())
    for name, word in (("style.initialiser", STYLES[0]), ("style.learned", "<new2>")):
        found = draw(styled.format("three", word), f"three, {word}")
        figures[name] = float((found.domains == 1).mean())
        figures[f"{name}.three"] = float((found.classes == 3).mean())
    found = draw(styled.format("<new1>", "<new2>"), "<new1>, <new2>")
    figures["both"] = float(((found.classes == UNSPOKEN) & (found.domains == 1)).mean())
    for name in ("known", "initialiser", "learned", "style.initialiser", "style.learned", "both"):
        print(f"{name}: {figures[name]:.1%}")
    grid += [("learned from", np.tile(example_pictures(5, kind), (2, 1, 1, 1))) for kind in (False, True)]
    config.out.mkdir(parents=True, exist_ok=True)
    pictures = np.concatenate([pixels for _, pixels in grid])
    columns = [str(number) for number in range(10)]
    write_overview(config.out / "grid.png", labelled_grid(pictures, [name for name, _ in grid], columns, "Tiny world"))
    (config.out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
