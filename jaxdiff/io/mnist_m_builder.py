"""The `mnist_m` builder of TensorFlow Datasets, prepared without TensorFlow into array_record files.

    python scripts/make_mnist_m.py --mnist DIR --photos DIR --format tfds

MNIST's idx files and the photographs (BSDS500's 200 training pictures in the paper) are read from folders that you
have, given as above or as `mnist` and `photos` inside TFDS's manual_dir; nothing is downloaded. Afterwards
`--data tfds:mnist_m` finds the data set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.io.mnist_m import IDX_FILES, make_split


class MnistM(tfds.core.GeneratorBasedBuilder):
    """MNIST-M (arXiv 1505.07818): MNIST digits blended into photographs, 28x28 RGB, 60,000 + 10,000."""

    name = "mnist_m"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "From idx files and a folder of photographs."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir must hold `mnist`, MNIST's four idx files, gzipped or not, and `photos`, a folder of photographs "
        "(BSDS500's training pictures)."
    )

    def __init__(self, *, mnist: Path | None = None, photos: Path | None = None, **options: Any):
        """Take the folders to prepare from; they are not needed to read what is prepared."""
        self._mnist, self._photos = mnist, photos
        super().__init__(**{"file_format": "array_record", **options})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://arxiv.org/abs/1505.07818",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        mnist = Path(self._mnist or dl_manager.manual_dir / "mnist")
        photos = Path(self._photos or dl_manager.manual_dir / "photos")
        return {split: self._generate_examples(split, mnist, photos) for split in IDX_FILES}

    def _generate_examples(self, split: str, mnist: Path, photos: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (image, label) in enumerate(zip(*make_split(mnist, photos, split))):
            # As a PIL image, because tfds encodes NumPy arrays with TensorFlow.
            yield number, {"image": Image.fromarray(image), "label": int(label)}
