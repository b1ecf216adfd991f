"""Data sets prepared by TensorFlow Datasets, read without TensorFlow: each builder is one domain.

They are looked for in ~/tensorflow_datasets, or in the folder that the environment variable TFDS_DATA_DIR names.
`as_data_source` reads array_record files (a builder prepared in the older tfrecord format needs TensorFlow). Our own
`mnist_m` builder prepares itself without TensorFlow; most bundled ones, `svhn_cropped` and `mnist` among them, need
it once, to be prepared.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import Dataset, Splits, choose_held_out, join
from jaxdiff.io.decoding import Encoded, decode_all


def load_tfds(names: list[str], image_size: int | None = None, workers: int | None = None) -> Splits:
    """Read the train and test splits of prepared builders with an `image` and an integer `label` each.

    Args:
      names: builders, `NAME` or `NAME:VERSION`; each becomes one domain, in this order.
      image_size: height and width in pixels to resize to; None keeps their own, which must then be equal.
      workers: decoding threads; None means a few more than there are cores.

    Raises:
      InputError: tensorflow-datasets is missing, or a builder is unknown, unprepared, or of another kind.
    """
    flag = f"--data tfds:{','.join(names)}"
    try:
        import tensorflow_datasets as tfds

        import jaxdiff.io.mnist_m_builder  # noqa: F401 (makes mnist_m known to tensorflow_datasets)
    except ImportError as error:
        raise InputError(f"{flag}: needs tensorflow-datasets ({error}): pip install -e '.[tfds]'") from error
    domain_names = tuple(name.split(":")[0] for name in names)
    if "" in domain_names or len(set(domain_names)) < len(names):
        raise InputError(f"{flag}: give each builder's name once, as in tfds:mnist_m,svhn_cropped")
    builders = [find_builder(tfds, name) for name in names]
    class_names = builders[0].info.features["label"].names
    if any(builder.info.features["label"].names != class_names for builder in builders):
        raise InputError(f"{flag}: the builders name their classes differently")
    if image_size is None:
        # Before anything is decoded, where the builders say how large their images are.
        check_sizes(flag, {builder.info.features["image"].shape[:2] for builder in builders} - {(None, None)})
    train, held_out = [], []
    skipped: list[str] = []
    for number, builder in enumerate(builders):
        parts = []
        for split in ("train", "test"):
            if split in builder.info.splits:
                encoded, labels = read_split(tfds, builder, split)
                images, kept, unread = decode_all(encoded, image_size, workers)
                domains = np.full(len(kept), number, np.int32)
                parts.append(Dataset(images, labels[kept], domains, tuple(class_names), domain_names))
                skipped.extend(unread)
        if len(parts) == 1:
            chosen = choose_held_out(parts[0])
            parts = [parts[0].subset(~chosen), parts[0].subset(chosen)]
        train.append(parts[0])
        held_out.append(parts[1])
    check_sizes(flag, {part.images.shape[1:3] for part in [*train, *held_out]})
    return Splits(join(train), join(held_out), tuple(skipped))


def find_builder(tfds: Any, name: str) -> Any:
    """Return a prepared image-classification builder, or raise InputError saying how to prepare it."""
    try:
        builder = tfds.builder(name)
    except Exception as error:  # of many kinds: no such name, version or configuration, damaged metadata
        raise InputError(f"--data tfds:{name}: tensorflow-datasets cannot open it ({first_line(error)})") from error
    if not builder.info.splits:
        raise InputError(f"--data tfds:{name}: not prepared in {builder.data_dir}: {how_to_prepare(name)}")
    features = dict(builder.info.features)
    if "train" not in builder.info.splits or not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise InputError(f"--data tfds:{name}: needs a train split with an image and a class label, `image`, `label`")
    return builder


def how_to_prepare(name: str) -> str:
    """Return the command that prepares a builder in a format that is read without TensorFlow."""
    if name.split(":")[0] == "mnist_m":
        return "run `python scripts/make_mnist_m.py --mnist DIR --photos DIR --format tfds`"
    return (
        f"run `tfds build {name} --file_format=array_record`, which needs TensorFlow this once "
        "(pip install -e '.[tfds]' tensorflow)"
    )


def read_split(tfds: Any, builder: Any, split: str) -> tuple[list[Encoded], Int[np.ndarray, "N"]]:
    """Read the pictures, not yet decoded, and labels of one split."""
    flag = f"--data tfds:{builder.name}"
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        examples = source.__getitems__(range(len(source)))
    except NotImplementedError as error:
        raise InputError(
            f"{flag}: prepared as {builder.info.file_format.value}, which only TensorFlow reads: prepare it again: "
            f"{how_to_prepare(builder.name)}"
        ) from error
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"{flag}: damaged files in {builder.data_dir} ({first_line(error)}): prepare it again"
        ) from error
    encoded = [Encoded(f"tfds:{builder.name} {split}[{i}]", example["image"]) for i, example in enumerate(examples)]
    return encoded, np.array([example["label"] for example in examples], np.int32)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_sizes(flag: str, sizes: set[tuple[int, int]]) -> None:
    """Raise InputError unless there is one size, (height, width)."""
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise InputError(f"{flag}: the builders' images differ in size ({listed}): give --image-size to resize all")
