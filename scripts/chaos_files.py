"""Hostile files: pictures, csv, JSON, safetensors, pickles."""

import csv
import io
import json
import random
import resource
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from chaos_pickles import read_payloads
from chaos_table import Effort, Outcome, Row, scratch_folder, spread
from PIL import Image

from jaxdiff.errors import InputError

MEGABYTES = 300
"""Most memory that hostile files may take beside what the process has."""


def hostile(effort: Effort) -> Iterator[Row]:
    """Read hostile files of every kind."""
    rows = {
        read_pictures: Row(
            "corrupt and hostile pictures",
            "skipped and counted, or a picture of the right size",
        ),
        read_tables: Row("corrupt and hostile csv", "one sentence, or exactly the pictures that it lists"),
        read_configs: Row("corrupt and hostile JSON: a run's config.json", "one sentence, or a config that is valid"),
        read_tensors: Row(
            "mutated and hostile safetensors", f"refused in one sentence, or every tensor right; under {MEGABYTES} MB"
        ),
        read_payloads: Row("pickles with payloads, in every reader of torch's files", "all refused, none executed"),
    }
    numbers = {read_pictures: 1500, read_tables: 1500, read_configs: 1500, read_tensors: 10_500, read_payloads: 1}
    for function, row in rows.items():
        number = effort.times(numbers[function])
        parts = 2 if number > 1 else 1
        row.add(spread(function, [(effort.scratch, effort.seed + part, number // parts) for part in range(parts)]))
        yield row


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change bytes as damage and malice do: some flipped, cut, doubled, put in, or a number made extreme."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randrange(1, 9)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 5:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"9999"])
            case 6:
                data[at : at + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"\n", b"\x00", b"e"])
    return bytes(data)


def _memory() -> float:
    """Return the most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Pictures


def encoded(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    """Encode a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """Write a PNG that says what it likes of its size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pictures() -> dict[str, tuple[bytes, bool | None]]:
    """Return hostile pictures, and whether each must be read; None where both are right."""
    good = encoded("RGB", (20, 20))
    bomb = zlib.compress(bytes(9001 * 9000))
    text = io.BytesIO()
    info = Image.new("RGB", (4, 4))
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("a", "b" * 2**24, zip=True)
    info.save(text, "PNG", pnginfo=texts)
    return {
        "good": (good, True),
        "81 million pixels in 79 kB": (png(9000, 9000, bomb), False),
        "a thousand million pixels": (png(32000, 32000, b""), False),
        "2^31 - 1 wide": (png(2**31 - 1, 2**31 - 1, b""), False),
        "no pixels": (png(0, 0, b""), False),
        "more pixels promised than there are": (png(3000, 3000, zlib.compress(b"\0" * 50)), None),
        "one pixel": (encoded("RGB", (1, 1)), True),
        "one pixel high": (encoded("RGB", (500, 1)), True),
        "grey": (encoded("L", (9, 9)), True),
        "black and white": (encoded("1", (9, 9)), True),
        "palette": (encoded("P", (9, 9)), True),
        "with alpha": (encoded("RGBA", (9, 9)), True),
        "grey with alpha": (encoded("LA", (9, 9)), True),
        "print colours": (encoded("CMYK", (9, 9), "JPEG"), True),
        "16 bits": (png(2, 2, zlib.compress(b"\0" + bytes(4) + b"\0" + bytes(4)), bits=16), False),
        "float": (encoded("F", (4, 4), "TIFF"), False),
        "16 MB of text in 16 kB": (text.getvalue(), None),
        "empty": (b"", False),
        "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
        "a zip": (b"PK\x03\x04" + bytes(100), False),
        "PostScript, which Pillow would run Ghostscript on": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            False,
        ),
    }


def read_pictures(job: tuple[Path, int, int]) -> list[Outcome]:
    """Read hostile pictures one by one, then a folder of all of them."""
    from jaxdiff.io.decoding import Encoded, decode
    from jaxdiff.io.folders import load_folder

    scratch, seed, number = job
    rng, outcomes, before = random.Random(seed), [], _memory()
    named = pictures()
    seeds = [content for name, (content, good) in named.items() if good] + [
        encoded("RGB", (30, 20), kind) for kind in ("JPEG", "BMP", "WEBP")
    ]
    files: list[tuple[str, bytes, bool | None]] = [(name, *value) for name, value in named.items()]
    files += [(f"mutation {n}", mutate(rng.choice(seeds), rng), None) for n in range(number)]
    read = 0
    for name, content, good in files:
        result = decode(Encoded(name, content), 16)
        is_read = not isinstance(result, str)
        read += is_read
        if good is not None and is_read != good:
            outcomes.append(Outcome("wrong", f"{name}: {result if isinstance(result, str) else 'read'}"))
        elif is_read and np.shape(result) != (16, 16, 3):
            outcomes.append(Outcome("wrong", f"{name}: {np.shape(result)}"))
        elif not is_read and (not str(result).startswith(name) or "\n" in str(result)):
            outcomes.append(Outcome("not named", str(result)))
        else:
            outcomes.append(Outcome("read" if is_read else "skipped and named"))
    with scratch_folder(scratch) as folder:
        for n, (_, content, _) in enumerate(files):
            path = folder / "domain" / str(n % 2) / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        splits = load_folder(folder, 16)
        total = len(splits.train.images) + len(splits.held_out.images)
        if (total, len(splits.skipped)) != (read, len(files) - read):
            outcomes.append(Outcome("wrong", f"{total} read and {len(splits.skipped)} skipped of {len(files)}"))
    if _memory() - before > MEGABYTES:
        outcomes.append(Outcome("memory", f"{_memory() - before:.0f} MB"))
    return outcomes


# Tables and configs

TABLES = {
    "a way out": b"image_name,label\n../secret.png,0\n",
    "an absolute path": b"image_name,label\n/etc/passwd,0\n",
    "a folder": b"image_name,label\n.,0\n",
    "no such picture": b"image_name,label\nnone.png,0\n",
    "negative": b"image_name,label\n0.png,-1\n",
    "a fraction": b"image_name,label\n0.png,1.5\n",
    "other digits": "image_name,label\n0.png,\u0663\n".encode(),
    "too large": b"image_name,label\n0.png,99999999999999999999\n",
    "a formula": b"image_name,label\n0.png,=1+1\n",
    "no label": b"image_name,label\n0.png\n",
    "other columns": b"name,class\n0.png,0\n",
    "empty": b"",
    "a header alone": b"image_name,label\n",
    "NUL": b"image_name,label\n0.png,0\x00\n",
    "not UTF-8": b"image_name,label\n\xff\xfe,0\n",
    "UTF-16": "image_name,label\n0.png,0\n".encode("utf-16"),
    "a field of a million": b"image_name,label\n" + b"a" * 1_000_000 + b",0\n",
    "an open quote": b'image_name,label\n"0.png,0\n' + b"1.png,1\n" * 100_000,
    "a number left out": b"image_name,label\n0.png,0\n1.png,2\n",
}


def read_tables(job: tuple[Path, int, int]) -> list[Outcome]:
    """Read hostile csv files of pictures."""
    from jaxdiff.io.folders import load_folder

    scratch, seed, number = job
    rng, outcomes = random.Random(seed), []
    good = b"image_name,label\n" + b"".join(b"%d.png,%d\n" % (n, n % 3) for n in range(12))
    tables = list(TABLES.items()) + [(f"mutation {n}", mutate(good, rng)) for n in range(number)]
    with scratch_folder(scratch) as folder:
        (folder / "secret.png").write_bytes(encoded("RGB", (4, 4)))
        (folder / "data" / "domain" / "data").mkdir(parents=True)
        for n in range(12):
            (folder / "data" / "domain" / "data" / f"{n}.png").write_bytes(encoded("RGB", (4, 4)))
        for name, content in tables:
            (folder / "data" / "domain" / "train.csv").write_bytes(content)
            try:
                splits = load_folder(folder / "data")
            except InputError as error:
                one_line = "\n" not in str(error) and len(str(error)) < 1000
                outcomes.append(Outcome("refused") if one_line else Outcome("no sentence", f"{name}: {error}"))
                continue
            rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
            found = len(splits.train.images) + len(splits.held_out.images)
            if name in TABLES or found != len(rows):
                outcomes.append(Outcome("accepted", f"{name}: {content[:200]!r}"))
            else:
                outcomes.append(Outcome("read as it says"))
    return outcomes


CONFIGS = {
    "nested": b'{"seed":' * 100_000,
    "lists": b"[" * 100_000,
    "a name twice": b'{"seed": 1, "seed": 2}',
    "no object": b"[]",
    "a long number": b'{"seed": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"seed": NaN}',
    "not UTF-8": b'{"seed": "\xff"}',
    "empty": b"",
    "a NUL": b"\x00",
}


def read_configs(job: tuple[Path, int, int]) -> list[Outcome]:
    """Read hostile configs of a run."""
    from jaxdiff.io.runs import as_json, check_config, read_run
    from jaxdiff.train_cfg import Config

    scratch, seed, number = job
    rng, outcomes = random.Random(seed), []
    good = json.dumps(as_json(Config()), indent=2).encode()
    configs = list(CONFIGS.items()) + [(f"mutation {n}", mutate(good, rng)) for n in range(number)]
    with scratch_folder(scratch) as folder:
        for name, content in configs:
            (folder / "config.json").write_bytes(content)
            said = []
            for read in (lambda: read_run(folder, Config), lambda: check_config(folder, as_json(Config()), ())):
                try:
                    read()
                except InputError as error:
                    said.append(str(error))
            if name in CONFIGS and len(said) < 2:
                outcomes.append(Outcome("accepted", f"{name}: {content[:200]!r}"))
            elif any("\n" in text for text in said):
                outcomes.append(Outcome("no sentence", f"{name}: {said}"))
            else:
                outcomes.append(Outcome("refused" if said else "valid"))
    return outcomes


# safetensors


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Write a file that says what it likes of its tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_files() -> dict[str, bytes]:
    """Return files that must be refused."""

    def entry(start: int, end: int, shape: object = (2,), dtype: object = "F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    eight = bytes(8)
    many = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(600_000))
    return {
        "a name twice": tensor_file(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            bytes(16),
        ),
        "600,000 tensors": tensor_file(b"{" + many + b"}"),
        "100,000 tensors": tensor_file(b"{" + many[: many.rfind(b',"100000"')] + b"}"),
        "a header of 2^63": tensor_file({}, length=2**63),
        "a header of 100 MB": struct.pack("<Q", 100_000_000) + b" " * 100_000_000,
        "a header of numbers": tensor_file(b'{"a":[' + b"0," * 10_000_000 + b"0]}"),
        "nested": tensor_file(b'{"a":' * 100_000),
        "overlap": tensor_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "a hole": tensor_file({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
        "backwards": tensor_file({"a": entry(8, 0)}, eight),
        "negative": tensor_file({"a": entry(-8, 0)}, eight),
        "too large": tensor_file({"a": entry(0, 2**63, (2**61,))}, eight),
        "overflow": tensor_file({"a": entry(0, 8, (2**33, 2**33))}, eight),
        "another size": tensor_file({"a": entry(0, 8, (3,))}, eight),
        "fractions": tensor_file({"a": entry(0, 8, (2.5,))}, eight),
        "text for a shape": tensor_file({"a": entry(0, 8, "2")}, eight),
        "no such type": tensor_file({"a": entry(0, 8, dtype="F33")}, eight),
        "a type as a list": tensor_file({"a": entry(0, 8, dtype=["F32"])}, eight),
        "metadata that are numbers": tensor_file({"__metadata__": {"a": 1}, "a": entry(0, 8)}, eight),
        "trailing bytes": tensor_file({"a": entry(0, 8)}, bytes(9)),
        "NaN": tensor_file({"a": entry(0, 8)}, struct.pack("<ff", 1, float("nan"))),
        "infinity": tensor_file({"a": entry(0, 8)}, struct.pack("<ff", 1, float("inf"))),
        "empty": b"",
        "seven bytes": bytes(7),
    }


def read_tensors(job: tuple[Path, int, int]) -> list[Outcome]:
    """Read hostile safetensors files as parameters of a model; mutations change anything but the numbers."""
    from jaxdiff.io.weights import load_params, read_safetensors, write_safetensors

    scratch, seed, number = job
    rng, outcomes = random.Random(seed), []
    numbers = np.random.default_rng(0)
    tree = {f"layer{n}": {"kernel": numbers.standard_normal((n + 2, 3)).astype(np.float32)} for n in range(6)}
    with scratch_folder(scratch) as folder:
        path = folder / "model.safetensors"
        write_safetensors(path, {f"{name}.kernel": layer["kernel"] for name, layer in tree.items()}, {"format": "np"})
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        hostile = tensor_files()
        expected = {"a": np.zeros(2, np.float32)}
        mutations = (mutate(good[:header], rng) + good[header:] for _ in range(number))
        before = _memory()
        for name, content in [*hostile.items(), *((f"mutation {n}", text) for n, text in enumerate(mutations))]:
            path.write_bytes(content)
            must_fail = name in hostile
            try:
                found = load_params(path, expected if must_fail else tree)
                with_names = dict(read_safetensors(path))
            except InputError as error:
                one_line = "\n" not in str(error) and len(str(error)) < 2000
                outcomes.append(Outcome("refused") if one_line else Outcome("no sentence", f"{name}: {error}"))
                continue
            same = not must_fail and all(
                np.array_equal(found[layer]["kernel"], tree[layer]["kernel"])
                and np.array_equal(with_names[f"{layer}.kernel"], tree[layer]["kernel"])
                for layer in tree
            )
            outcomes.append(Outcome("harmless: all right") if same else Outcome("silent", f"{name}: {content[:600]!r}"))
        # The files themselves are in this process too, some twice: the largest has 100 MB.
        if _memory() - before > MEGABYTES:
            outcomes.append(Outcome("memory", f"{_memory() - before:.0f} MB"))
        shutil.rmtree(folder)
    return outcomes
