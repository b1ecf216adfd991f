"""From a decoded picture to what a CLIP checkpoint wants to see, as its preprocessor_config.json says.

    (1)  resize, then cut or pad around the centre, in Pillow and NumPy, uint8
    (2)  (pixel * rescale_factor - image_mean) / image_std, of each channel

(2) has 256 values a channel, so it is a table; looked up in it, pixels become the same floats on every device.
Both equal transformers' CLIPImageProcessor (its Pillow backend) to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.hub import Fetch
from jaxdiff.io.strict_json import read_strict_json

FILE, NEW_FILE = "preprocessor_config.json", "processor_config.json"
"""The second is where transformers 5 writes it, under `image_processor`."""
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

Picture = UInt8[np.ndarray, "_ _ 3"]
Side = int | tuple[int, int] | None
"""The shorter side in pixels, or (height, width), or None to leave the size alone."""


@dataclass(frozen=True)
class Preprocessor:
    """How one checkpoint wants its pictures.

    Attributes:
      resize: size before the cut.
      crop: (height, width) of the cut.
      resample: Pillow's number of the filter; 3 is bicubic.
      rescale_factor: what pixels in 0..255 are multiplied by, None for nothing.
      image_mean: subtracted from each channel, after rescaling.
      image_std: what each channel is divided by, then.
    """

    resize: Side = 224
    crop: tuple[int, int] = (224, 224)
    resample: int = 3
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, float, float] | None = OPENAI_MEAN
    image_std: tuple[float, float, float] | None = OPENAI_STD

    def cut(self, pixels: Picture) -> UInt8[np.ndarray, "H W 3"]:
        """Return step (1)."""
        if self.resize is not None:
            height, width = pixels.shape[:2]
            if isinstance(self.resize, int):
                # The longer side is rounded down, as transformers does.
                longer = int(self.resize * max(height, width) / min(height, width))
                height, width = (longer, self.resize) if width <= height else (self.resize, longer)
            else:
                height, width = self.resize
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling(self.resample))
            pixels = np.asarray(image)
        return cut_centre(pixels, *self.crop)

    @property
    def table(self) -> Float[np.ndarray, "256 3"]:
        """What each pixel value becomes in each channel, step (2)."""
        values = np.arange(256, dtype=np.float64)
        if self.rescale_factor is not None:
            values = values * self.rescale_factor
        table = np.repeat(values.astype(np.float32)[:, None], 3, axis=1)
        if self.image_mean is not None and self.image_std is not None:
            mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
            table = np.divide(np.subtract(table, mean), std)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return what a preprocessor_config.json says of this."""

        def sizes(size: Side) -> Any:
            return {"height": size[0], "width": size[1]} if isinstance(size, tuple) else {"shortest_edge": size}

        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": self.resize is not None,
            "size": sizes(self.resize or self.crop),
            "do_center_crop": True,
            "crop_size": sizes(self.crop),
            "resample": self.resample,
            "do_rescale": self.rescale_factor is not None,
            "rescale_factor": self.rescale_factor or 1 / 255,
            "do_normalize": self.image_mean is not None,
            "image_mean": self.image_mean or OPENAI_MEAN,
            "image_std": self.image_std or OPENAI_STD,
        }

    def __call__(self, pixels: Picture) -> Float[np.ndarray, "3 H W"]:
        """Return the `pixel_values` of one picture, channels first, as transformers' processors do."""
        cut = self.cut(pixels)
        return np.stack([self.table[cut[..., channel], channel] for channel in range(3)])


def cut_centre(pixels: Picture, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Return the centre of a picture, on black where the picture is smaller."""
    out = np.zeros((height, width, 3), np.uint8)
    places = []
    for have, want in zip(pixels.shape, (height, width)):
        # Odd differences: a cut begins at the smaller half, a picture on black at the larger.
        start = (have - want) // 2 if have >= want else 0
        place = 0 if have >= want else -((have - want) // 2)
        size = min(have, want)
        places.append((slice(place, place + size), slice(start, start + size)))
    (to_rows, from_rows), (to_columns, from_columns) = places
    out[to_rows, to_columns] = pixels[from_rows, from_columns]
    return out


def read_preprocessor(name: str, fetch: Fetch, image_size: int) -> Preprocessor:
    """Return how a published model wants its pictures, checked to give the size that its network takes.

    Raises:
      InputError: no such file, or a value that cannot be followed; the message names it.
    """
    path = fetch(FILE)
    values: Any = read_strict_json(path) if path else None
    if values is None and (path := fetch(NEW_FILE)):
        values = read_strict_json(path).get("image_processor")
    if not isinstance(values, dict):
        raise InputError(
            f"{name}: has no {FILE}, so nothing says how its pictures are resized and normalized; copy it from where "
            "the model was published"
        )
    preprocessor = parse(str(path), values)
    if preprocessor.crop != (image_size, image_size):
        height, width = preprocessor.crop
        raise InputError(f"{path}: gives pictures of {width}x{height} pixels, but the network takes {image_size}")
    return preprocessor


def parse(origin: str, values: Mapping[str, Any]) -> Preprocessor:
    """Return what a preprocessor_config.json says; a key that is missing has CLIP's value.

    Raises:
      InputError: a value that cannot be followed.
    """
    try:
        resize = parse_size(values.get("size", 224)) if values.get("do_resize", True) else None
        crop = parse_size(values.get("crop_size", 224)) if values.get("do_center_crop", True) else resize
        if isinstance(crop, int) and values.get("do_center_crop", True):
            crop = (crop, crop)
        if not isinstance(crop, tuple):
            raise ValueError("it leaves pictures of different sizes")
        normalized = values.get("do_normalize", True)
        return Preprocessor(
            resize,
            crop,
            int(Image.Resampling(values.get("resample", 3))),
            float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else None,
            three(values.get("image_mean", OPENAI_MEAN)) if normalized else None,
            three(values.get("image_std", OPENAI_STD)) if normalized else None,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{origin}: cannot be followed ({error})") from error


def parse_size(value: Any) -> int | tuple[int, int]:
    """Return the shorter side, or (height, width)."""
    if isinstance(value, dict):
        value = value["shortest_edge"] if "shortest_edge" in value else (value["height"], value["width"])
    sides = value if isinstance(value, tuple) else (value,)
    if not all(type(side) is int and 0 < side <= 4096 for side in sides):
        raise ValueError(f"size {value!r} is not in 1..4096 pixels")
    return value


def three(values: Any) -> tuple[float, float, float]:
    """Return one number a channel."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue
