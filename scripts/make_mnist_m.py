"""Make MNIST-M from MNIST's idx files and a folder of photographs (BSDS500's training pictures in the paper).

    python scripts/make_mnist_m.py --mnist DIR --photos DIR --out data

Writes {out}/mnistm/train.csv, test.csv and data/*.png, the layout that `jaxdiff train_cfg --data {out}` reads, or,
with --format tfds, prepares the mnist_m builder that `--data tfds:mnist_m` reads.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdiff.command import run_command
from jaxdiff.settings import require, require_at_least


@dataclass(frozen=True)
class Config:
    """Make MNIST-M from MNIST's idx files and a folder of photographs."""

    mnist: Path
    """Folder of MNIST's four idx files, gzipped or not."""
    photos: Path
    """Folder of photographs, searched to the bottom."""
    out: Path | None = None
    """Folder to write into; None means `data` for folders, the user's tensorflow_datasets folder for tfds."""
    format: Literal["folders", "tfds"] = "folders"
    """PNG files with csv tables, or array_record files of the mnist_m builder (needs the tfds extra)."""
    seed: int = 0
    """Seed of the crops; the test split uses the next one. Only for folders: the builder's is fixed at 0."""

    def __post_init__(self):
        require_at_least("seed", self.seed, 0)
        require(self.format == "folders" or self.seed == 0, "--seed has no effect with --format tfds: drop it")


def run(config: Config) -> list[Path]:
    """Blend, write, and return the paths written."""
    return write_folders(config) if config.format == "folders" else prepare_builder(config)


def write_folders(config: Config) -> list[Path]:
    """Write PNG files and one csv a split."""
    from jaxdiff.io.folders import write_split
    from jaxdiff.io.mnist_m import IDX_FILES, make_split

    folder, written = (config.out or Path("data")) / "mnistm", 0
    tables = []
    for split in IDX_FILES:
        images, labels = make_split(config.mnist, config.photos, split, config.seed)
        tables.append(write_split(folder, split, images, labels, first_number=written))
        written += len(images)
    return [folder / "data", *tables]


def prepare_builder(config: Config) -> list[Path]:
    """Prepare the tfds builder."""
    from jaxdiff.errors import InputError

    try:
        from jaxdiff.io.mnist_m_builder import MnistM
    except ImportError as error:
        raise InputError("--format tfds needs tensorflow-datasets: pip install -e '.[tfds]'") from error
    builder = MnistM(mnist=config.mnist, photos=config.photos, data_dir=config.out)
    builder.download_and_prepare()
    return [Path(builder.data_path)]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command("make_mnist_m", Config, run, args)


if __name__ == "__main__":
    sys.exit(main())
