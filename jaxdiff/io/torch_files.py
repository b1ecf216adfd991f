"""Tensors in files of torch.save, read without torch and without running what the file says.

Such a file is a zip archive: a pickle that describes the tensors, and one record with the bytes of each storage. A
pickle is a program, so Python's own unpickler is not used: `_interpret` follows the instructions that tensors need and
no others, and all that the program may call stands in `_KNOWN`. That is stricter than torch.load's weights_only, which
runs in a process like any other: nothing here can import, call or set anything that the file names, and sizes are
checked before memory is taken for them. So no child process is needed to hold what a hostile file might start.
"""

import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.weights import LazyTensors, ShardedTensors

MAX_PICKLE_BYTES = 2**22
"""Longest pickle that is read; a tensor needs about 200 bytes of it."""
MAX_PROTOCOL = 5
"""Newest pickle protocol that there is."""
MAX_REPEATED = 2**20
"""Most elements of a view that repeats its storage (`expand` makes such), which could otherwise claim any size."""


def read_torch(path: Path) -> Any:
    """Return what torch.save wrote: a tensor, or dicts, lists, tuples and plain values with tensors in them.

    Tensors come as NumPy arrays, read-only where they share their storage, wherever they were saved from: the device
    is ignored.

    Raises:
      InputError: not a zip file of torch.save, damaged, or it asks for anything that tensors do not need.
    """
    with _blaming(path), _open_archive(path) as archive:
        records = _Records(archive, path.stat().st_size, keeps_all=True)
        return _interpret(records, _KNOWN, finish=_View.read)


def read_state_dict(path: Path) -> LazyTensors:
    """Open a file that holds names and tensors, and nothing else; each access reads one tensor.

    Raises:
      InputError: as `read_torch`, or something else is in it.
    """
    return _open_state_dict(path)


def read_sharded_state_dict(index: Path) -> ShardedTensors:
    """Open the `*.bin.index*.json` of a model that was split over several files, each as `read_state_dict` reads it.

    Raises:
      InputError: as `read_state_dict`; or index and files do not fit each other.
    """
    # One for all, so that not the last storage of every file stays in memory.
    cache: _Cache = {}
    return ShardedTensors(index, ".bin", lambda path: _open_state_dict(path, cache))


def read_checkpoint(path: Path) -> LazyTensors:
    """Open the state dict of a checkpoint of PyTorch Lightning, or one that was saved alone, as `read_state_dict` does.

    What a checkpoint holds beside its state dict is thrown away, so the few names of `_THROWN_AWAY` may stand there:
    they become a placeholder that does nothing, whatever is done to it.

    Raises:
      InputError: as `read_state_dict`.
    """
    with _blaming(path):
        value, records = _interpret_lazily(path, _KNOWN | dict.fromkeys(_THROWN_AWAY, _INERT))
    inner = value.get("state_dict") if isinstance(value, dict) else None
    return _as_tensors(path, value if inner is None else inner, records)


def _open_state_dict(path: Path, cache: "_Cache | None" = None) -> LazyTensors:
    with _blaming(path):
        value, records = _interpret_lazily(path, _KNOWN, cache)
    return _as_tensors(path, value, records)


def _as_tensors(path: Path, value: Any, records: "_Records") -> LazyTensors:
    """Return the tensors of a state dict, checked to be one."""
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {_describe(value)} instead of names and tensors")
    others = [name for name, tensor in value.items() if not (isinstance(tensor, _View) and isinstance(name, str))]
    if others or not value:
        raise InputError(
            f"{path}: {f'holds {others[0]!r}, which is no tensor' if others else 'holds no tensors'}; load it with "
            "torch and save the model's state_dict() alone"
        )

    def read(name: str) -> np.ndarray:
        with _blaming(path):
            return value[name].read()

    return LazyTensors({name: (view.size, view.dtype.name) for name, view in value.items()}, read)


def _describe(value: Any) -> str:
    return "tensor" if isinstance(value, _View) else type(value).__name__.strip("_").lower()


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what is found wrong into a sentence about the file."""
    try:
        yield
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


class _RefusedImport(Exception):  # noqa: N818 (becomes an InputError that names the file)
    """A pickle asks for a name that is not known."""


@dataclass(frozen=True)
class _StorageType:
    """A class of torch such as FloatStorage, by the type of its elements; None for bytes of any type."""

    dtype: np.dtype | None


class _Inert:
    """What a name becomes that is thrown away: calls and states make nothing else of it."""


_INERT = _Inert()
_PARAMETERS = _Inert()
"""The class torch.nn.ParameterDict, of which new objects may be made."""


class _ParameterDict(dict):
    """What torch.nn.ParameterDict becomes: its tensors by name, and nothing of the module that it is."""


@dataclass(frozen=True)
class _Storage:
    """Bytes that tensors are views of, not read yet."""

    records: "_Records"
    key: str
    nbytes: int
    dtype: np.dtype | None


@dataclass(frozen=True)
class _View:
    """A tensor that has been described and checked, not read."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> np.ndarray:
        if math.prod(self.size) == 0:
            return np.zeros(self.size, self.dtype)
        width = self.dtype.itemsize
        data = self.storage.records.read(self.storage.key)
        flat = np.frombuffer(data, np.uint8, len(data) // width * width)
        if self.storage.records.swapped:
            part = width // 2 if self.dtype.kind == "c" else width
            flat = flat.view(f"u{part}").byteswap()
        start = flat.view(self.dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(start, self.size, [n * width for n in self.stride], writeable=False)


@dataclass(frozen=True)
class _Function:
    """A function of torch, by what stands in for it."""

    call: Callable[..., Any]


def _open_archive(path: Path) -> zipfile.ZipFile:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise InputError(
            f"{path}: a bare pickle, as torch before 1.6 wrote; load it with torch and save it again with "
            "torch >= 1.6, or as safetensors"
        )
    if start != b"PK\x03\x04":
        raise InputError(f"{path}: not a file of torch.save")
    return zipfile.ZipFile(path)


_Cache = dict[tuple[str | None, str], bytes]
"""Bytes of storages by the archive's path and the storage's name."""


class _Records:
    """The records of an archive.

    Attributes:
      pickled: the pickle that describes the tensors.
      swapped: whether the bytes of numbers stand in the other order than this machine's.
    """

    def __init__(self, archive: zipfile.ZipFile, file_size: int, keeps_all: bool, cache: _Cache | None = None):
        """Check the archive's directory.

        Args:
          archive: open; it stays so as long as storages are read.
          file_size: bytes of the archive.
          keeps_all: keep every storage that was read, not just the last.
          cache: of several archives, of which together just the last storage is kept; None means one of its own.
        """
        self._archive, self._keeps_all = archive, keeps_all
        self._cache: _Cache = {} if cache is None else cache
        self._sizes = {record.filename: record.file_size for record in archive.infolist()}
        if len(self._sizes) < len(archive.infolist()):
            raise ValueError("two records have one name")
        # torch compresses nothing, so what claims more bytes than the file has, would unpack to any size.
        if sum(self._sizes.values()) > file_size or any(
            record.compress_type != zipfile.ZIP_STORED
            or record.compress_size != record.file_size
            or record.flag_bits & 1
            for record in archive.infolist()
        ):
            raise ValueError("compressed, encrypted or overlapping records")
        pickles = [name for name in self._sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        if (size := self._sizes[pickles[0]]) > MAX_PICKLE_BYTES:
            raise ValueError(f"a pickle of {size:,} bytes, over the {MAX_PICKLE_BYTES:,} allowed")
        self._folder = pickles[0].removesuffix("data.pkl")
        self.pickled = archive.read(pickles[0])
        order = f"{self._folder}byteorder"
        order = archive.read(order).decode() if order in self._sizes else "little"
        if order not in ("little", "big"):
            raise ValueError(f"byte order {order!r}")
        self.swapped = order != sys.byteorder

    def find(self, name: Any) -> _Storage:
        """Return a storage by the pickle's name for it."""
        kind, storage_type, key, _device, numel = name
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        record = f"{self._folder}data/{key}"
        if record not in self._sizes:
            raise ValueError(f"there is no item named {record!r} in the archive")
        expected = _check_type(numel, int) * (storage_type.dtype.itemsize if storage_type.dtype else 1)
        if self._sizes[record] != expected:
            raise ValueError(f"storage {key} has {self._sizes[record]:,} bytes instead of {expected:,}")
        return _Storage(self, key, expected, storage_type.dtype)

    def read(self, key: str) -> bytes:
        """Return the bytes of a storage."""
        place = self._archive.filename, key
        if place not in self._cache:
            if not self._keeps_all:
                self._cache.clear()
            self._cache[place] = self._archive.read(f"{self._folder}data/{key}")  # compares the checksum
        return self._cache[place]


def _interpret_lazily(path: Path, known: Mapping[str, Any], cache: _Cache | None = None) -> tuple[Any, _Records]:
    """Return what a file describes, with a `_View` for each tensor, and the records, which stay open."""
    records = _Records(_open_archive(path), path.stat().st_size, keeps_all=False, cache=cache)
    return _interpret(records, known, finish=lambda view: view), records


def _interpret(records: _Records, known: Mapping[str, Any], finish: Callable[[_View], Any]) -> Any:
    """Return what a pickle describes, following only the instructions that tensors in containers need.

    Args:
      records: where the pickle lies, and the storages that it names.
      known: every name that it may ask for, and what it gets.
      finish: what becomes of each tensor.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what each open MARK has set aside
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    for opcode, arg, _ in pickletools.genops(records.pickled):
        match opcode.name:
            case "PROTO" if arg in range(MAX_PROTOCOL + 1):
                pass
            case "FRAME":  # how much to read ahead, which is all in memory already
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
                    if not isinstance(key, str | int | _Inert):
                        raise ValueError("a key that is neither text nor a number")
                    _check_type(stack[-1], dict)[key] = value
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_look_up(known, str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_look_up(known, ".".join(_last(stack, 2)))]
            case "BINPERSID":
                stack.append(records.find(stack.pop()))
            case "REDUCE":
                args, function = _check_type(stack.pop(), tuple), stack.pop()
                value = _INERT if function is _INERT else _check_type(function, _Function).call(*args)
                stack.append(finish(value) if isinstance(value, _View) else value)
            case "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                if function is not _PARAMETERS or args != ():
                    raise ValueError("a new object, which is none of tensors by name")
                stack.append(_ParameterDict())
            case "BUILD":
                attributes = stack.pop()
                if isinstance(stack[-1], _ParameterDict):
                    stack[-1].update(_check_type(_check_type(attributes, dict)["_parameters"], dict))
                elif stack[-1] is not _INERT:
                    # Those of a state dict (versions of its modules), which nothing here needs.
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


def _look_up(known: Mapping[str, Any], name: str) -> Any:
    if name not in known:
        raise _RefusedImport(name if name.isprintable() else repr(name))
    return known[name]


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _View:
    """Stand in for torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if metadata:
        raise ValueError("a view that is conjugated or negated; save its clone()")
    return _view(storage, _check_type(storage, _Storage).dtype, offset, size, stride)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> _View:
    """Stand in for torch._utils._rebuild_tensor_v3, for types that have no storage class."""
    return _tensor(replace(_check_type(storage, _Storage), dtype=dtype), offset, size, stride, metadata=metadata)


def _view(storage: _Storage, dtype: Any, offset: Any, size: Any, stride: Any) -> _View:
    """Return a view of a storage, having checked that it lies inside."""
    _check_type(dtype, np.dtype)
    numbers = (offset, *_check_type(size, tuple), *_check_type(stride, tuple))
    if len(numbers) != 1 + 2 * min(len(size), 64) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor whose size, stride and offset do not fit each other")
    numel, available = math.prod(size), storage.nbytes // dtype.itemsize
    if numel == 0:
        np.zeros(size, dtype)  # refuses what is too large for an array
    elif offset + sum((n - 1) * step for n, step in zip(size, stride)) >= available:
        raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset} in {available} elements")
    elif numel > max(available, MAX_REPEATED):
        raise ValueError(f"a tensor of {numel:,} elements that repeats {available:,}; save its clone()")
    return _View(storage, dtype, offset, size, stride)


def _parameter(data, requires_grad, hooks) -> Any:
    """Stand in for torch._utils._rebuild_parameter."""
    if not isinstance(data, np.ndarray | _View):
        raise ValueError(f"a {_describe(data)} in the place of a tensor")
    return data


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
    "torch.nn.modules.container.ParameterDict": _PARAMETERS,
    # Only among the attributes of a module.
    "__builtin__.set": _Function(lambda items: _INERT),
    "builtins.set": _Function(lambda items: _INERT),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch.storage.UntypedStorage": _StorageType(None),
    **{f"torch.{name}Storage": _StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
"""Every name that a pickle may ask for, and what it gets."""
_THROWN_AWAY = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
"""What Lightning's checkpoints name beside their state dict: a callback as a key, and its best score as a number."""
