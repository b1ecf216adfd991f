"""Data sets prepared by TensorFlow Datasets, read without TensorFlow: each builder is one domain.

`as_data_source` reads array_record files (a builder prepared in the older tfrecord format needs TensorFlow). Our own
`mnist_m` builder prepares itself without TensorFlow; most bundled ones, `svhn_cropped` and `mnist` among them, need
it once, to be prepared.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Dataset, Splits, split_off
from jaxdiff.io.folders import concatenate
from jaxdiff.io.images import resize_image


def load_tfds(names: list[str], image_size: int | None = None) -> Splits:
    """Read the train and test splits of prepared builders with an `image` and an integer `label` each.

    Args:
      names: builders, `NAME` or `NAME:VERSION`; each becomes one domain, in this order.
      image_size: height and width in pixels to resize to; None keeps their own, which must then be equal.

    Raises:
      InputError: tensorflow-datasets is missing, or a builder is unknown, unprepared, or of another kind.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"--data tfds:{','.join(names)}: reading it needs tensorflow-datasets: pip install 'jaxdiff[tfds]'"
        ) from error
    import jaxdiff.io.mnist_m_builder  # registers mnist_m with tensorflow_datasets

    del jaxdiff
    builders = [find_builder(tfds, name) for name in names]
    label_names = [builder.info.features["label"].names for builder in builders]
    if any(other != label_names[0] for other in label_names):
        raise InputError(f"--data tfds:{','.join(names)}: the builders name their classes differently")
    train, held_out = [], []
    for number, (name, builder) in enumerate(zip(names, builders)):
        parts = {
            split: read_split(builder, name, split, number, tuple(names), image_size)
            for split in ("train", "test")
            if split in builder.info.splits
        }
        first, second = (parts["train"], parts["test"]) if "test" in parts else split_off(parts["train"])
        train.append(first)
        held_out.append(second)
    return Splits(join(names, train), join(names, held_out))


def find_builder(tfds: Any, name: str) -> Any:
    """Return a prepared image-classification builder, or raise InputError saying how to prepare it."""
    try:
        builder = tfds.builder(name)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"--data tfds:{name}: tensorflow-datasets knows no builder of that name") from error
    if not builder.info.splits:
        how = (
            "run `python scripts/make_mnist_m.py --mnist DIR --photos DIR --format tfds`"
            if name.split(":")[0] == "mnist_m"
            else f"run `tfds build {name} --file_format=array_record`, which needs TensorFlow "
            "(pip install tensorflow) this once"
        )
        raise InputError(f"--data tfds:{name}: not prepared in {builder.data_dir}: {how}")
    if not {"image", "label"} <= set(builder.info.features) or "train" not in builder.info.splits:
        raise InputError(f"--data tfds:{name}: needs a train split with features image and label")
    return builder


def read_split(
    builder: Any, name: str, split: str, domain: int, domain_names: tuple[str, ...], image_size: int | None
) -> Dataset:
    """Decode one split into memory."""
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise InputError(
            f"--data tfds:{name}: prepared as {builder.info.file_format.value}, which only TensorFlow reads: prepare "
            f"it again with `tfds build {name} --file_format=array_record`"
        ) from error
    with ThreadPoolExecutor() as pool:
        examples = list(pool.map(source.__getitem__, range(len(source))))
    images = [as_rgb(example["image"], image_size) for example in examples]
    for image in images:
        if image.shape != images[0].shape:
            raise InputError(f"--data tfds:{name}: its images differ in size: give --image-size to resize all")
    labels = np.array([example["label"] for example in examples], np.int32)
    names = tuple(builder.info.features["label"].names)
    return Dataset(np.stack(images), labels, np.full(len(labels), domain, np.int32), names, domain_names)


def as_rgb(image: UInt8[np.ndarray, "H W C"], image_size: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """Give a picture three channels and the size asked for."""
    if image.shape[-1] == 1:
        image = np.asarray(Image.fromarray(image[..., 0]).convert("RGB"))
    return image if image_size is None else resize_image(image, image_size)


def join(names: list[str], parts: list[Dataset]) -> Dataset:
    """Join the builders' pictures, which must be of one size."""
    joined = parts[0]
    for part in parts[1:]:
        if part.images.shape[1:] != joined.images.shape[1:]:
            sizes = ", ".join(f"{n} {p.images.shape[2]}x{p.images.shape[1]}" for n, p in zip(names, parts))
            raise InputError(f"--data tfds:{','.join(names)}: sizes differ ({sizes}): give --image-size to resize all")
        joined = concatenate(joined, part)
    return joined
