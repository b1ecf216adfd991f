"""Tensors in files of torch.save, read without torch and without running what the file says.

Such a file is a zip archive: a pickle that describes the tensors, and one record with the bytes of each storage. A
pickle is a program, so Python's own unpickler is not used: `_interpret` follows the instructions that tensors need and
no others, and all that the program may call stands in `_KNOWN`.
"""

import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.errors import InputError

MAX_PICKLE_BYTES = 2**22
"""Longest pickle that is read; a tensor needs about 200 bytes of it."""
MAX_REPEATED = 2**20
"""Most elements of a view that repeats its storage (`expand` makes such), which could otherwise claim any size."""


def read_torch(path: Path) -> Any:
    """Return what torch.save wrote: a tensor, or dicts, lists, tuples and plain values with tensors in them.

    Tensors come as NumPy arrays, read-only where they share their storage, wherever they were saved from: the device
    is ignored.

    Raises:
      InputError: not a zip file of torch.save, damaged, or it asks for anything that tensors do not need.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:1] == b"\x80":
            raise InputError(
                f"{path}: a bare pickle, as torch before 1.6 wrote; load it with torch and save it again with "
                "torch >= 1.6, or as safetensors"
            )
        if start != b"PK\x03\x04":
            raise InputError(f"{path}: not a file of torch.save")
        with zipfile.ZipFile(path) as archive:
            return _interpret(*_open_records(archive, path.stat().st_size))
    except _RefusedImport as error:
        raise InputError(
            f"{path}: asks to import {error}, which tensors do not need, so it may run code; where you trust it, load "
            "it with torch and save its state_dict() alone"
        ) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except InputError:
        raise
    # What a wrong program makes of the stack: wrong types, wrong counts, nothing left.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not the tensors that torch.save writes ({error}); is it damaged?") from error


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file that holds names and tensors, and nothing else.

    Raises:
      InputError: as `read_torch`, or something else is in it.
    """
    value = read_torch(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__} instead of names and tensors")
    others = [name for name, tensor in value.items() if not isinstance(tensor, np.ndarray)]
    if others or not value:
        raise InputError(
            f"{path}: {f'holds {others[0]!r}, which is no tensor' if others else 'holds no tensors'}; load it with "
            "torch and save the model's state_dict() alone"
        )
    return value


class _RefusedImport(Exception):  # noqa: N818 (becomes an InputError that names the file)
    """A pickle asks for a name that is not known."""


@dataclass(frozen=True)
class _StorageType:
    """A class of torch such as FloatStorage, by the type of its elements; None for bytes of any type."""

    dtype: np.dtype | None


@dataclass(frozen=True)
class _Storage:
    """The bytes that tensors are views of."""

    data: bytes
    dtype: np.dtype | None
    swapped: bool


@dataclass(frozen=True)
class _Function:
    """A function of torch, by what stands in for it."""

    call: Callable[..., Any]


def _open_records(archive: zipfile.ZipFile, file_size: int) -> tuple[bytes, Callable[[Any], _Storage]]:
    """Return the pickle of an archive, and what finds a storage by the pickle's name for it."""
    records = {record.filename: record for record in archive.infolist()}
    if len(records) < len(archive.infolist()):
        raise ValueError("two records have one name")
    # torch compresses nothing, so what claims more bytes than the file has, would unpack to any size.
    if sum(record.file_size for record in records.values()) > file_size or any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size or record.flag_bits & 1
        for record in records.values()
    ):
        raise ValueError("compressed, encrypted or overlapping records")
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if records[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {records[pickles[0]].file_size:,} bytes, over the {MAX_PICKLE_BYTES:,} allowed")
    order = archive.read(f"{folder}byteorder").decode() if f"{folder}byteorder" in records else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byte order {order!r}")
    storages: dict[str, bytes] = {}

    def find_storage(name: Any) -> _Storage:
        kind, storage_type, key, _device, numel = name
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        if key not in storages:
            storages[key] = archive.read(f"{folder}data/{key}")  # compares the checksum
        expected = _check_type(numel, int) * (storage_type.dtype.itemsize if storage_type.dtype else 1)
        if len(storages[key]) != expected:
            raise ValueError(f"storage {key} has {len(storages[key]):,} bytes instead of {expected:,}")
        return _Storage(storages[key], storage_type.dtype, order != sys.byteorder)

    return archive.read(pickles[0]), find_storage


def _interpret(pickled: bytes, find_storage: Callable[[Any], _Storage]) -> Any:
    """Return what a pickle describes, following only the instructions that tensors in containers need."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # what each open MARK has set aside
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for opcode, arg, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below.append(stack)
                stack = []
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(_last(stack, count))]
            case "TUPLE":
                items = to_mark()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _check_type(stack[-1], list).append(item)
            case "APPENDS":
                items = to_mark()
                _check_type(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, str | int):
                        raise ValueError("a key that is neither text nor a number")
                    _check_type(stack[-1], dict)[key] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_look_up(str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_look_up(".".join(_last(stack, 2)))]
            case "BINPERSID":
                stack.append(find_storage(stack.pop()))
            case "REDUCE":
                args = _check_type(stack.pop(), tuple)
                stack.append(_check_type(stack.pop(), _Function).call(*args))
            case "BUILD":
                # The attributes of a state dict (versions of its modules), which nothing here needs.
                stack.pop()
                _check_type(stack[-1], OrderedDict)
            case _:
                raise ValueError(f"instruction {opcode.name}, which tensors do not need")
    raise ValueError("it has no end")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("it takes more than it has")
    return stack[-count:]


def _check_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__.strip('_')}")
    return value


def _look_up(name: str) -> Any:
    if name not in _KNOWN:
        raise _RefusedImport(name)
    return _KNOWN[name]


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> np.ndarray:
    """Stand in for torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if metadata:
        raise ValueError("a view that is conjugated or negated; save its clone()")
    return _view(storage, _check_type(storage, _Storage).dtype, offset, size, stride)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> np.ndarray:
    """Stand in for torch._utils._rebuild_tensor_v3, for types that have no storage class."""
    return _tensor(replace(_check_type(storage, _Storage), dtype=dtype), offset, size, stride, metadata=metadata)


def _view(storage: _Storage, dtype: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """Return a view of a storage, having checked that it lies inside."""
    _check_type(dtype, np.dtype)
    numbers = (offset, *_check_type(size, tuple), *_check_type(stride, tuple))
    if len(numbers) != 1 + 2 * min(len(size), 64) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor whose size, stride and offset do not fit each other")
    numel, available = math.prod(size), len(storage.data) // dtype.itemsize
    if numel == 0:
        return np.zeros(size, dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= available:
        raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset} in {available} elements")
    if numel > max(available, MAX_REPEATED):
        raise ValueError(f"a tensor of {numel:,} elements that repeats {available:,}; save its clone()")
    flat = np.frombuffer(storage.data, np.uint8, available * dtype.itemsize)
    if storage.swapped:
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = flat.view(f"u{part}").byteswap()
    steps = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat.view(dtype)[offset:], size, steps, writeable=False)


_DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "complex128": np.dtype("complex128"),
    "complex64": np.dtype("complex64"),
    "int64": np.dtype("int64"),
    "int32": np.dtype("int32"),
    "int16": np.dtype("int16"),
    "int8": np.dtype("int8"),
    "uint64": np.dtype("uint64"),
    "uint32": np.dtype("uint32"),
    "uint16": np.dtype("uint16"),
    "uint8": np.dtype("uint8"),
    "bool": np.dtype("bool"),
}
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Function(lambda: OrderedDict()),
    "torch.Size": _Function(tuple),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(lambda data, requires_grad, hooks: _check_type(data, np.ndarray)),
    "torch.storage.UntypedStorage": _StorageType(None),
    **{f"torch.{name}Storage": _StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
"""Every name that a pickle may ask for, and what it gets."""
