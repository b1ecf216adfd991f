"""Pictures between files (uint8, 0..255) and networks (float, [-1, 1]); the only place where the two ranges meet."""

import os
import struct
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

MAX_PIXELS = 16_000_000
"""Pictures with more pixels than this are refused before they are decoded (decompression bombs)."""
OVERVIEW = {"Description": "jaxdiff: an overview of several pictures"}
"""What a PNG file says that shows others once more, so that it is not taken for one of them."""

# `read_image` refuses such a picture itself. Set once: warnings.catch_warnings is not safe in threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def to_float(pixels):
    """Map 0..255 to [-1, 1] in float32; works on NumPy and JAX arrays alike, so it can run on the device."""
    return pixels.astype("float32") / 127.5 - 1.0


def to_uint8(images: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Map [-1, 1] to 0..255, clipped and rounded to nearest: a wrapped byte costs a judge 23 points of accuracy."""
    scaled = np.clip(np.asarray(images, np.float32), -1.0, 1.0) * 127.5 + 127.5
    return np.rint(scaled).astype(np.uint8)


def stretch_to_uint8(images: Float[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W C"]:
    """Map each image's own least and greatest value, over all channels, to 0 and 255."""
    low, high = images.min(axis=(1, 2, 3), keepdims=True), images.max(axis=(1, 2, 3), keepdims=True)
    return np.rint((images - low) / np.where(high > low, high - low, 1.0) * 255).astype(np.uint8)


def read_image(
    file: Path | BytesIO, max_pixels: int = MAX_PIXELS, as_shown: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode one picture as RGB.

    Args:
      file: to read.
      max_pixels: that it may have.
      as_shown: as a viewer shows it: turned as the camera says that it was held, and on white where it is transparent.

    Raises:
      OSError: missing, truncated, no picture, more than 8 bits a channel, or more pixels than `max_pixels`; the message
        need not name the file.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise OSError(f"{width}x{height} pixels, more than the {max_pixels:,} allowed")
            if image.mode[0] in "IF":
                # Pillow would clip instead of scale.
                raise OSError("more than 8 bits a channel")
            return np.asarray((_on_white(ImageOps.exif_transpose(image)) if as_shown else image).convert("RGB"))
    except (Image.DecompressionBombError, SyntaxError, ValueError, struct.error) as error:
        raise OSError(f"not a readable picture ({error})") from error


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def is_transparent(path: Path) -> bool:
    """Tell whether a picture that can be read has a pixel that is not opaque."""
    with Image.open(path) as image:
        return image.has_transparency_data and bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())


def write_png(path: Path, pixels: UInt8[np.ndarray, "H W C"], about: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write one RGB (or one-channel) picture, whole or not at all, with texts `about` it by keyword."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    for keyword, text in about.items():
        texts.add_itxt(keyword, text)
    partial = path.with_name(f"{path.name}.partial")
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    picture.save(partial, "PNG", pnginfo=texts)
    os.replace(partial, path)


def write_overview(
    path: Path, pixels: UInt8[np.ndarray, "H W 3"], about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a grid, a strip or a sheet of pictures, which says that it is one, and more `about` it by keyword."""
    write_png(path, pixels, {**about, **OVERVIEW})


def is_overview(path: Path) -> bool:
    """Tell whether `write_overview` wrote a file; only its beginning is read."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and OVERVIEW.items() <= image.info.items()
    except (OSError, ValueError, SyntaxError):
        return False


def read_png_texts(path: Path) -> dict[str, str] | None:
    """Return the texts that a PNG file holds beside its picture; None if there is no readable one."""
    try:
        with Image.open(path) as image:
            image.load()
            return {name: str(text) for name, text in getattr(image, "text", {}).items()}
    except (OSError, ValueError, SyntaxError):
        return None


def resize_image(pixels: UInt8[np.ndarray, "H W C"], size: int) -> UInt8[np.ndarray, "h w C"]:
    """Resize to size x size with Pillow's antialiased bicubic filter, after cutting the longer side centrally."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
