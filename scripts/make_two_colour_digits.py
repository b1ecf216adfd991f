"""Paint grey pictures of digits with two random colours each, as a stand-in for a data set whose colours are lost.

    python scripts/make_two_colour_digits.py --digits svhn_test_grey_32x32.npz --out data

Reads an .npz with `images` (N, H, W bytes), `labels` (N integers) and, if there is one, `box_visible` (share of the
digit inside the picture); writes {out}/{name}/train.csv and data/*.png, which `jaxdiff train_cfg --data {out}` reads.
"""

import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.command import run_command
from jaxdiff.settings import require, require_at_least


@dataclass(frozen=True)
class Config:
    """Paint grey pictures of digits with two random colours each."""

    digits: Path
    """File of pictures and labels (.npz)."""
    out: Path = Path("data")
    """Folder to write into."""
    name: str = "svhn_two_colour"
    """Name of the domain's folder."""
    image_size: int = 28
    """Height and width in pixels to resize to."""
    least_visible: float = 0.8
    """Leave out digits of which less than this share is inside the picture, 0 to 1."""
    seed: int = 0
    """Seed of the colours."""

    def __post_init__(self):
        require_at_least("seed", self.seed, 0)
        require_at_least("image_size", self.image_size, 1)
        require(0 <= self.least_visible <= 1, f"--least-visible must lie in [0, 1], got {self.least_visible}")


def run(config: Config) -> list[Path]:
    """Read, paint, resize and write."""
    import numpy as np

    from jaxdiff.errors import InputError
    from jaxdiff.io.digits import contrasting_colours
    from jaxdiff.io.folders import write_split
    from jaxdiff.io.images import resize_image

    try:
        with np.load(config.digits, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"].astype(np.int32)
            visible = file["box_visible"] if "box_visible" in file else np.ones(len(labels))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{config.digits}: not an .npz with `images` and `labels`") from error
    if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise InputError(f"{config.digits}: `images` must be N x H x W bytes with N `labels`")
    kept = visible >= config.least_visible
    images, labels = images[kept], labels[kept]
    dark, light = (
        colour[:, None, None] for colour in contrasting_colours(len(images), np.random.default_rng(config.seed))
    )
    share = images[..., None].astype(np.float32) / 255
    painted = np.rint(dark + (light - dark) * share).astype(np.uint8)
    resized = np.stack([resize_image(picture, config.image_size) for picture in painted])
    folder = config.out / config.name
    table = write_split(folder, "train", resized, labels)
    return [folder / "data", table]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("make_two_colour_digits", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
