"""Pickles that would run code, by the tricks that are known, in every kind of file and every reader of such files."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_table import Outcome, scratch_folder

CALLS = {
    "os.system": ("os", "system", "touch {marker}"),
    "posix.system": ("posix", "system", "touch {marker}"),
    "builtins.eval": ("builtins", "eval", "open({marker!r}, 'w').close()"),
    "builtins.exec": ("builtins", "exec", "open({marker!r}, 'w').close()"),
    "__builtin__.eval": ("__builtin__", "eval", "open({marker!r}, 'w').close()"),
    "subprocess.getoutput": ("subprocess", "getoutput", "touch {marker}"),
    "os.popen": ("os", "popen", "touch {marker}"),
    "commands.getoutput": ("commands", "getoutput", "touch {marker}"),
    "pathlib.Path.touch": ("pathlib", "Path.touch", "{marker}"),
    "os.mkdir": ("os", "mkdir", "{marker}"),
    "nt.system": ("nt", "system", "touch {marker}"),
    "code.interact": ("code", "interact", "{marker}"),
    "importlib.import_module": ("importlib", "import_module", "antigravity"),
    "runpy.run_path": ("runpy", "run_path", "{marker}"),
    "pickle.loads": ("pickle", "loads", "{marker}"),
    "numpy.load": ("numpy", "load", "{marker}"),
    "torch.load": ("torch", "load", "{marker}"),
    "torch.hub.load": ("torch.hub", "load", "{marker}"),
    "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes", "{marker}"),
    "torch.jit.load": ("torch.jit", "load", "{marker}"),
    "numpy.f2py.crackfortran.getlincoef": ("numpy.f2py.crackfortran", "getlincoef", "open({marker!r}, 'w')"),
    "timeit.timeit": ("timeit", "timeit", "open({marker!r}, 'w').close()"),
    "cProfile.run": ("cProfile", "run", "open({marker!r}, 'w').close()"),
    "pdb.run": ("pdb", "run", "open({marker!r}, 'w').close()"),
    "pip._internal.main": ("pip._internal", "main", "{marker}"),
    "webbrowser.open": ("webbrowser", "open", "file://{marker}"),
    "asyncio.run": ("asyncio", "run", "{marker}"),
    "ctypes.CDLL": ("ctypes", "CDLL", "{marker}"),
    "collections.OrderedDict.__reduce__": ("collections", "OrderedDict.__reduce__", "{marker}"),
    "torch.Size.__class__": ("torch", "Size.__class__", "{marker}"),
    "torch._utils.os.system": ("torch._utils", "os.system", "touch {marker}"),
    "torch.os.system": ("torch", "os.system", "touch {marker}"),
    "torch._utils._rebuild_tensor_v2.__globals__": ("torch._utils", "_rebuild_tensor_v2.__globals__", "{marker}"),
    "a dotted name in the module": ("torch._utils.os", "system", "touch {marker}"),
    "a newline in the name": ("os\nsystem", "x", "touch {marker}"),
}

HARMLESS = ("a frame of 2^63", "tuples in tuples")
"""What asks for nothing but, in other readers, memory; it may be read."""


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def programs(marker: str) -> dict[str, bytes]:
    """Return pickles that would make the marker file, each call in several writings."""
    found = {}
    for name, (module, function, argument) in CALLS.items():
        arg = _text(argument.format(marker=marker))
        stack = b"\x80\x04" + _text(module) + _text(function) + b"\x93"
        lines = b"\x80\x02c" + module.encode() + b"\n" + function.encode() + b"\n"
        found |= {
            f"{name}, STACK_GLOBAL and REDUCE": stack + arg + b"\x85R.",
            f"{name}, GLOBAL and REDUCE": lines + arg + b"\x85R.",
            f"{name}, INST": b"\x80\x02(" + arg + b"i" + module.encode() + b"\n" + function.encode() + b"\n.",
            f"{name}, OBJ": b"\x80\x02(" + lines[2:] + arg + b"o.",
            f"{name}, NEWOBJ": stack + arg + b"\x85\x81.",
            f"{name}, NEWOBJ_EX": stack + arg + b"\x85}\x92.",
            f"{name}, by way of the memo": stack + b"\x940" + b"h\x00" + arg + b"\x85R.",
            f"{name}, inside a dict": b"\x80\x04}" + _text("weight") + stack[2:] + arg + b"\x85Rs.",
            f"{name}, as a state": b"\x80\x04ccollections\nOrderedDict\n)R" + stack[2:] + arg + b"\x85Rb.",
            f"{name}, as a key": b"\x80\x04}" + stack[2:] + arg + b"\x85RK\x01s.",
            f"{name}, thrown away": b"\x80\x04" + stack[2:] + arg + b"\x85R0}.",
            f"{name}, as a persistent id": b"\x80\x04" + stack[2:] + arg + b"\x85RQ.",
            f"{name}, without an end": stack + arg + b"\x85R",
        }
    return found | {
        "an extension registered by number": b"\x80\x02\x82\x01.",
        "an unknown instruction": b"\x80\x04\xff.",
        "a text persistent id": b"\x80\x02Pos.system\n.",
        "protocol 200": b"\x80\xc8}.",
        "a long of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
        "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
        "marks without end": b"\x80\x02" + b"(" * 100_000 + b".",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "a list that doubles": b"\x80\x02]" + b"(h\x00h\x00e" * 50 + b".",
        "Python's own reduce": pickle.dumps(_Reduces(marker)),
    }


class _Reduces:
    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({self.marker!r}, 'w').close()",))


def archive(program: bytes, *others: tuple[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    """Return a file as torch.save writes it around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as records:
        records.writestr("archive/data.pkl", program)
        for name, content in (("archive/byteorder", b"little"), ("archive/version", b"3\n"), *others):
            records.writestr(name, content)
    return file.getvalue()


def read_payloads(job: tuple[Path, int, int]) -> list[Outcome]:
    """Read every payload with every reader; all must refuse it, and nothing may have run."""
    from jaxdiff.errors import InputError
    from jaxdiff.io.learned_embeddings import read_learned
    from jaxdiff.io.torch_files import read_checkpoint, read_state_dict, read_torch

    def all_tensors(reader: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: dict(reader(path).items())

    readers = {
        "read_torch": read_torch,
        "read_state_dict": all_tensors(read_state_dict),
        "read_checkpoint": all_tensors(read_checkpoint),
        "read_learned": read_learned,
    }
    outcomes = []
    with scratch_folder(job[0]) as folder:
        marker = folder / "executed"
        for name, program in programs(str(marker)).items():
            for kind, content in (
                ("bare", program),
                ("in an archive", archive(program)),
                ("in a compressed archive", archive(program, compress=zipfile.ZIP_DEFLATED)),
                ("beside a second archive's", archive(b"\x80\x02}.", ("other/data.pkl", program))),
            ):
                path = folder / "model.pt"
                path.write_bytes(content)
                for reader, read in readers.items():
                    what = f"{name}, {kind}, {reader}"
                    try:
                        read(path)
                        harmless = name in HARMLESS
                        outcomes.append(Outcome("read, harmless") if harmless else Outcome("accepted", what))
                    except InputError as error:
                        one_line = "\n" not in str(error)
                        outcomes.append(Outcome("refused") if one_line else Outcome("no sentence", f"{what}: {error}"))
                    except Exception as error:
                        outcomes.append(Outcome("crash", f"{what}: {error!r}"))
                    if marker.exists():
                        outcomes.append(Outcome("executed", what))
                        marker.unlink()
    return outcomes
