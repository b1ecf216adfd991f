"""Pictures: the two ranges meet exactly, and a file that is no good is refused before it costs memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.images import is_transparent, read_image, resize_image, to_float, to_uint8, write_png

BYTES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def png_claiming(width, height):
    """Return a PNG whose header claims a size and whose data is empty."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_byte_survives_the_round_trip():
    assert (to_uint8(to_float(BYTES)) == BYTES).all()


def test_range_ends_and_clipping():
    assert to_float(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]
    assert to_uint8(np.array([-7.0, -1.0, 1.0, 1.01, 9.0])).tolist() == [0, 0, 255, 255, 255]


def test_bytes_are_rounded_to_nearest():
    # 100.4 and 100.6 on the byte scale.
    assert to_uint8(np.array([100.4, 100.6]) / 127.5 - 1).tolist() == [100, 101]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA"])
def test_any_8_bit_picture_reads_as_rgb(tmp_path, mode):
    grey = np.where(BYTES[0] < 128, 0, 255).astype(np.uint8)
    Image.fromarray(grey[..., 0]).convert(mode).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == np.repeat(grey, 3, axis=-1)).all()


def test_reads_from_memory():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 9, np.uint8)).save(file, "PNG")
    assert read_image(io.BytesIO(file.getvalue())).shape == (4, 5, 3)


def test_a_picture_is_turned_as_the_camera_was_held_where_that_is_asked_for(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is at the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", as_shown=True), np.rot90(pixels, -1))


def test_what_is_cut_out_lies_on_white_as_a_viewer_shows_it(tmp_path):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((0, 0), (9, 8, 7, 255))
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", as_shown=True).tolist() == [[[9, 8, 7], [255, 255, 255]]]
    assert is_transparent(tmp_path / "a.png")
    picture.putalpha(255)
    picture.save(tmp_path / "b.png")
    assert not is_transparent(tmp_path / "b.png")


def test_write_then_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_png(tmp_path / "below" / "a.png", pixels)
    assert (read_image(tmp_path / "below" / "a.png") == pixels).all()


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000), (4_001, 4_000)])
def test_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_claiming(*size))
    with pytest.raises(OSError, match=r"pixels"):
        read_image(tmp_path / "bomb.png")


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="8 bits"):
        read_image(tmp_path / "deep.png")


def test_damage_never_raises_anything_but_oserror(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        damaged = damaged[: rng.integers(len(damaged)) if rng.random() < 0.3 else None]
        try:
            read_image(io.BytesIO(bytes(damaged)))
        except OSError:
            refused += 1
    assert refused > 400


def test_resize_keeps_the_centre_and_a_constant():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (resize_image(wide, 8) == 200).all()
    assert (resize_image(np.full((9, 9, 3), 77, np.uint8), 16) == 77).all()
