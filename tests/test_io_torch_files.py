"""Files of torch.save read without torch: against torch's own tensors, and every way in which a file can be wrong."""

import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conversion import write_bin_shards

from jaxdiff.errors import InputError
from jaxdiff.io.torch_files import (
    MAX_PICKLE_BYTES,
    read_checkpoint,
    read_sharded_state_dict,
    read_state_dict,
    read_torch,
)

X = torch.arange(24.0).reshape(4, 6)
FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]
DTYPES = [*FLOATS, "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]


def rewrite(path, change=None, compression=zipfile.ZIP_STORED, extra=()):
    """Write the records of a zip file anew: `change(name, data)` returns the new bytes, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*records, *extra]:
            if (data := change(name, data) if change else data) is not None:
                archive.writestr(name, data)


def change_pickle(old, new):
    def change(name, data):
        if not name.endswith("data.pkl"):
            return data
        assert data.count(old) >= 1
        return data.replace(old, new)

    return change


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def assert_same(ours, theirs):
    theirs = theirs.detach()
    assert ours.shape == tuple(theirs.shape)
    assert ours.dtype.name == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(ours.astype(np.complex128), theirs.to(torch.complex128).numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_as_torch_has_it(tmp_path, dtype, protocol):
    tensor = X.to(getattr(torch, dtype))
    assert_same(read_torch(saved(tmp_path / "a.pt", tensor, pickle_protocol=protocol)), tensor)


def test_views_share_and_parameters_are_tensors(tmp_path):
    linear = torch.nn.Linear(2, 3)
    tensors = {
        "turned": X.t(),
        "part": X[1:, 1::2],
        "number": X[2, 3],
        "none": torch.zeros(0, 3),
        "repeated": torch.ones(1).expand(5),
        "parameter": linear.weight,
    }
    found = read_torch(saved(tmp_path / "a.pt", tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert np.shares_memory(found["turned"], found["part"])


def test_a_state_dict_and_plain_values(tmp_path):
    linear = torch.nn.Linear(2, 3)
    value = {"model": linear.state_dict(), "step": [1, 2**40, -3, 0.5, True, None, "x", (), (1, (2, 3), 4, 5)]}
    found = read_torch(saved(tmp_path / "a.pt", {**value, "size": X.shape}))
    assert found["step"] == value["step"]
    assert found["size"] == (4, 6)
    assert isinstance(found["model"], OrderedDict)
    assert_same(found["model"]["weight"], linear.weight)
    state = read_state_dict(saved(tmp_path / "b.pt", linear.state_dict()))
    assert list(state) == ["weight", "bias"]


def test_the_device_does_not_matter(tmp_path):
    path = saved(tmp_path / "a.pt", X)
    rewrite(path, change_pickle(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert_same(read_torch(path), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.uint8])
def test_bytes_of_the_other_order(tmp_path, dtype):
    tensor = X.to(dtype)
    path = saved(tmp_path / "a.pt", tensor)
    size = tensor.element_size() // (2 if dtype.is_complex else 1)

    def change(name, data):
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(data, f"u{size}").byteswap().tobytes() if "/data/" in name else data

    rewrite(path, change)
    assert_same(read_torch(path), tensor)
    # Files of torch before 2.1 have no such record, and are little-endian.
    rewrite(saved(path, tensor), lambda name, data: None if name.endswith("byteorder") else data)
    assert_same(read_torch(path), tensor)


def test_the_readers_never_import_torch(tmp_path):
    path = saved(tmp_path / "a.pt", {"a": X})
    code = (
        "import sys; from pathlib import Path; from jaxdiff.io.torch_files import read_state_dict;"
        f"assert read_state_dict(Path({str(path)!r}))['a'].sum() == 276;"
        "assert not {'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- code


class Runs:
    def __init__(self, function, *args):
        self.reduce = function, args

    def __reduce__(self):
        return self.reduce


class Instance:
    pass


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "asks"),
    [
        (Runs(os.system, "touch {ran}"), f"{os.system.__module__}.system"),
        (Runs(eval, "open('{ran}', 'w')"), "(builtins|__builtin__).eval"),
        (Runs(getattr, X, "data_ptr"), "(builtins|__builtin__).getattr"),
        (Runs(pickle.loads, b""), "pickle.loads"),
        (Runs(torch.load, "{ran}"), "torch.serialization.load"),
        (Runs(np.load, "{ran}"), "numpy.load"),
        (Instance(), "Instance"),
        ({"callbacks": {"x": Instance}}, "Instance"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (X.to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_code_is_refused_by_the_name_that_it_asks_for(tmp_path, value, asks, protocol):
    ran = tmp_path / "ran"
    if isinstance(value, Runs):
        function, args = value.reduce
        value = Runs(function, *(a.format(ran=ran) if isinstance(a, str) else a for a in args))
    path = saved(tmp_path / "a.pt", {"tensor": X, "evil": value}, pickle_protocol=protocol)
    with pytest.raises(InputError, match=rf"a\.pt: asks to import \S*{asks}, which tensors do not need"):
        read_torch(path)
    assert not ran.exists()


PICKLES = {
    "calls a class by INST": b"(S'ls'\nios\nsystem\n.",
    "calls what is no function": b"\x80\x02ctorch\nfloat32\n)R.",
    "calls a storage class": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "passes no tuple": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "passes too many": b"\x80\x02ccollections\nOrderedDict\n(]]tR.",
    "changes a function": b"\x80\x02ctorch.Size\n.",
    "sets attributes of a type": b"\x80\x02ctorch\nfloat32\n}b.",
    "sets attributes of a list": b"\x80\x02]}b.",
    "puts items into a tuple": b"\x80\x02)K\x01K\x02s.",
    "appends to a dict": b"\x80\x02}K\x01a.",
    "a list as key": b"\x80\x02}]K\x02s.",
    "a key without a value": b"\x80\x02}(K\x01K\x02K\x03u.",
    "takes from nothing": b"\x80\x02R.",
    "a mark that is not there": b"\x80\x02t.",
    "memory that is not there": b"\x80\x02h\x07.",
    "three of one": b"\x80\x02K\x01\x87.",
    "no end": b"\x80\x02K\x01",
    "nothing": b"",
    "nothing at its end": b"\x80\x02.",
    "an unknown instruction": b"\xff",
    "a persistent text id": b"P123\n.",
    "a storage by a number": b"\x80\x02K\x01Q.",
    "a storage of another kind": b"\x80\x02(U\x06modulectorch\nFloatStorage\nU\x010U\x03cpuK\x18tQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "more than there is": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a rebuilt nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01K\x02K\x03tR.",
    "names that are numbers": b"\x80\x04K\x01K\x02\x93.",
    "depth": b"\x80\x02" + b"]" + b"\x85" * 300_000 + b".",
}


@pytest.mark.parametrize("name", [name for name in PICKLES if name != "depth"])
def test_a_program_that_makes_no_sense_is_one_sentence(tmp_path, name):
    path = saved(tmp_path / "a.pt", X)
    rewrite(path, lambda record, data: PICKLES[name] if record.endswith("data.pkl") else data)
    with pytest.raises(InputError) as caught:
        read_torch(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_great_depth_ends_no_process(tmp_path):
    path = saved(tmp_path / "a.pt", X)
    rewrite(path, lambda record, data: PICKLES["depth"] if record.endswith("data.pkl") else data)
    with pytest.raises(InputError, match="holds a tuple instead of names and tensors"):
        read_state_dict(path)


# --- views beyond their storage


def save_view(path, size, stride, offset):
    """Save a view that torch itself would not make."""

    class Pickled(torch.Tensor):
        def __reduce_ex__(self, protocol):
            function, (storage, *_) = X.__reduce_ex__(protocol)
            return function, (storage, offset, size, stride, False, OrderedDict())

    return saved(path, [X.as_subclass(Pickled)])


def test_a_view_inside_its_storage_is_read(tmp_path):
    (found,) = read_torch(save_view(tmp_path / "a.pt", (2, 3), (6, 2), 1))
    np.testing.assert_array_equal(found, [[1, 3, 5], [7, 9, 11]])


@pytest.mark.parametrize(
    ("size", "stride", "offset", "sentence"),
    [
        ((4, 7), (6, 1), 0, "in 24 elements"),
        ((4, 6), (7, 1), 0, "in 24 elements"),
        ((4, 6), (6, 1), 1, "in 24 elements"),
        ((1,), (1,), 24, "in 24 elements"),
        ((2,), (2**62,), 0, "in 24 elements"),
        ((4, 6), (6, -1), 5, "do not fit each other"),
        ((4, 6), (6, 1), -1, "do not fit each other"),
        ((4, -6), (6, 1), 0, "do not fit each other"),
        ((4, 6), (6,), 0, "do not fit each other"),
        ((4.0, 6), (6, 1), 0, "do not fit each other"),
        ((True, 6), (6, 1), 0, "do not fit each other"),
        ((1,) * 65, (1,) * 65, 0, "do not fit each other"),
        ([4, 6], (6, 1), 0, "a list in the place of a tuple"),
        ((2**21,), (0,), 0, "2,097,152 elements that repeats 24"),
        ((2**70, 0), (1, 1), 0, "not the tensors that torch[.]save writes"),
    ],
)
def test_a_view_outside_its_storage_is_refused(tmp_path, size, stride, offset, sentence):
    with pytest.raises(InputError, match=sentence):
        read_torch(save_view(tmp_path / "a.pt", size, stride, offset))


# --- archives


def test_damaged_bytes_are_found(tmp_path):
    path = saved(tmp_path / "a.pt", X)
    data = bytearray(path.read_bytes())
    data[data.index(X.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"truncated or damaged \(Bad CRC-32"):
        read_torch(path)


def truncated(path):
    path.write_bytes(saved(path, X).read_bytes()[:-30])
    return "truncated or damaged"


def compressed(path):
    rewrite(saved(path, torch.zeros(10_000)), compression=zipfile.ZIP_DEFLATED)
    return "compressed, encrypted or overlapping records"


def record_twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(saved(path, X), extra=[("a/data/0", bytes(96))])
    return "two records have one name"


def short_storage(path):
    rewrite(saved(path, X), lambda name, data: data[:-4] if name.endswith("data/0") else data)
    return "storage 0 has 92 bytes instead of 96"


def no_storage(path):
    rewrite(saved(path, X), lambda name, data: None if name.endswith("data/0") else data)
    return "no item named 'a/data/0' in the archive"


def no_pickle(path):
    rewrite(saved(path, X), lambda name, data: None if name.endswith("data.pkl") else data)
    return "it has no data.pkl"


def long_pickle(path):
    rewrite(saved(path, X), lambda name, data: bytes(MAX_PICKLE_BYTES + 1) if name.endswith("data.pkl") else data)
    return "over the 4,194,304 allowed"


def strange_byte_order(path):
    rewrite(saved(path, X), lambda name, data: b"middle" if name.endswith("byteorder") else data)
    return "byte order 'middle'"


def before_1_6(path):
    saved(path, X, _use_new_zipfile_serialization=False)
    return "a bare pickle, as torch before 1.6 wrote; .* save it again with torch >= 1.6"


def conjugated(path):
    saved(path, torch.ones(2, dtype=torch.complex64).conj())
    return r"conjugated or negated; save its clone\(\)"


def float8(path):
    saved(path, X.to(torch.float8_e4m3fn))
    return "asks to import torch.float8_e4m3fn"


def text(path):
    path.write_text("hello")
    return "not a file of torch.save"


def empty(path):
    path.write_bytes(b"")
    return "not a file of torch.save"


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    return "it has no data.pkl"


def absent(path):
    return "cannot be read .No such file"


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        compressed,
        record_twice,
        short_storage,
        no_storage,
        no_pickle,
        long_pickle,
        strange_byte_order,
        before_1_6,
        conjugated,
        float8,
        text,
        empty,
        other_zip,
        absent,
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, spoil):
    path = tmp_path / "a.pt"
    sentence = spoil(path)
    with pytest.raises(InputError, match=sentence) as caught:
        read_torch(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_bomb_of_overlapping_records_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", torch.zeros(1000))
    data = bytearray(path.read_bytes())
    # The central directory names the storage's bytes a hundred times.
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        start = archive.start_dir
        count = len(archive.infolist())
    end = data.index(b"PK\x05\x06") if b"PK\x06\x06" not in data else data.index(b"PK\x06\x06")
    directory = bytes(data[start:end])
    first = directory[: directory.index(b"PK\x01\x02", 4)]
    many = b"".join(first.replace(b"data.pkl", b"%08d" % i) for i in range(100))
    new_directory = directory + many
    tail = b"PK\x05\x06" + bytes(4)
    tail += (count + 100).to_bytes(2, "little") * 2 + len(new_directory).to_bytes(4, "little")
    tail += start.to_bytes(4, "little") + bytes(2)
    path.write_bytes(bytes(data[:start]) + new_directory + tail)
    with pytest.raises(InputError, match="overlapping records"):
        read_torch(path)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (X, "holds a tensor instead of names and tensors"),
        ({"state_dict": {"a": X}}, r"holds 'state_dict', which is no tensor; .* save the model's state_dict\(\) alone"),
        ({}, "holds no tensors"),
    ],
)
def test_a_state_dict_is_names_and_tensors_alone(tmp_path, value, sentence):
    with pytest.raises(InputError, match=sentence):
        read_state_dict(saved(tmp_path / "a.pt", value))


# --- one tensor at a time


def test_a_state_dict_is_read_one_tensor_at_a_time(tmp_path):
    tensors = {"a": X, "turned": X.t(), "half": X.half(), "none": torch.zeros(0, 3), "big": X.to(torch.bfloat16)}
    path = saved(tmp_path / "a.pt", tensors)
    # Damage one tensor: it is found when that is read, and hinders no other.
    data = bytearray(path.read_bytes())
    data[data.index(X.half().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    found = read_state_dict(path)
    assert found.specs["turned"] == ((6, 4), "float32")
    assert found.specs["big"] == ((4, 6), "bfloat16")
    for name in tensors.keys() - {"half"}:
        assert_same(found[name], tensors[name])
    with pytest.raises(InputError, match=r"a\.pt: truncated or damaged \(Bad CRC-32"):
        found["half"]
    with pytest.raises(KeyError):
        found["absent"]


# --- checkpoints of Lightning


def save_with_class(path, make, module="pytorch_lightning.callbacks.model_checkpoint", name="ModelCheckpoint"):
    """Save what `make` makes of a class that exists only while it is saved."""
    with pytest.MonkeyPatch.context() as patch:
        names = module.split(".")
        for i in range(len(names)):
            patch.setitem(sys.modules, ".".join(names[: i + 1]), types.ModuleType(".".join(names[: i + 1])))
        made = type(name, (), {"__module__": module, "__reduce__": lambda self: (made, ("x",), {"state": 1})})
        made.__init__ = lambda self, *args: None
        setattr(sys.modules[module], name, made)
        return saved(path, make(made))


def test_what_stands_beside_a_state_dict_is_thrown_away(tmp_path):
    numbers = {"best_model_score": np.float32(0.5), "best": X[0], "step": np.int64(3)}
    for make in (
        lambda made: {"state_dict": {"a": X}, "callbacks": {made: numbers}},
        lambda made: {"state_dict": {"a": X}, "callbacks": [made, made(), (made(),)]},
    ):
        path = save_with_class(tmp_path / "a.ckpt", make)
        found = read_checkpoint(path)
        assert list(found) == ["a"]
        assert_same(found["a"], X)
        with pytest.raises(InputError, match=r"asks to import pytorch_lightning\S+ModelCheckpoint"):
            read_state_dict(path)
    assert list(read_checkpoint(saved(tmp_path / "b.ckpt", {"a": X}))) == ["a"]


def test_a_checkpoint_names_nothing_else(tmp_path):
    path = save_with_class(
        tmp_path / "a.ckpt", lambda made: {"state_dict": {"a": X}, "x": made}, "lightning.os", "system"
    )
    with pytest.raises(InputError, match=r"a\.ckpt: asks to import lightning\.os\.system, which tensors do not need"):
        read_checkpoint(path)
    ran = tmp_path / "ran"
    path = saved(tmp_path / "a.ckpt", {"state_dict": {"a": X}, "callbacks": Runs(os.system, f"touch {ran}")})
    with pytest.raises(InputError, match=rf"asks to import {os.system.__module__}\.system"):
        read_checkpoint(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda made: {"state_dict": {"a": X, "x": made}},
        lambda made: {"state_dict": {made: X}},
        lambda made: {"state_dict": made},
        lambda made: made,
        lambda made: {"state_dict": {}},
    ],
)
def test_a_placeholder_is_no_tensor(tmp_path, make):
    with pytest.raises(InputError, match=r"no tensor|instead of names and tensors"):
        read_checkpoint(save_with_class(tmp_path / "a.ckpt", make))


# --- several files


def test_several_files_are_read_as_one(tmp_path):
    tensors = {name: torch.full((n, 2), float(n)) for n, name in enumerate("abc", 1)}
    found = read_sharded_state_dict(write_bin_shards(tmp_path / "pytorch_model.bin", tensors))
    assert found.specs == {name: (tuple(tensor.shape), "float32") for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert [path.name for path in found.files] == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def without_a_shard(folder, index):
    (folder / "model-00002-of-00002.bin").unlink()
    return r"missing beside it: model-00002-of-00002\.bin; download the folder again"


def without_a_tensor(folder, index):
    torch.save({"a": torch.ones(2)}, folder / "model-00001-of-00002.bin")
    return r"not where it says: c \(model-00001-of-00002\.bin\)"


def with_one_more(folder, index):
    torch.save({"b": torch.ones(2), "extra": torch.ones(2)}, folder / "model-00002-of-00002.bin")
    return "not listed: extra"


def with_safetensors(folder, index):
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    return r"names 'model\.safetensors', but may only name bin files beside itself"


def with_code(folder, index):
    torch.save({"b": torch.ones(2), "c": print}, folder / "model-00002-of-00002.bin")
    return r"model-00002-of-00002\.bin: asks to import __builtin__\.print"


@pytest.mark.parametrize("spoil", [without_a_shard, without_a_tensor, with_one_more, with_safetensors, with_code])
def test_several_files_that_do_not_fit_are_one_sentence(tmp_path, spoil):
    index = write_bin_shards(tmp_path / "model.bin", {name: torch.ones(2) for name in "abc"})
    sentence = spoil(tmp_path, index)
    with pytest.raises(InputError, match=sentence):
        read_sharded_state_dict(index)


def test_of_several_files_one_storage_stays_in_memory(tmp_path):
    index = write_bin_shards(tmp_path / "model.bin", {name: torch.zeros(2**20) for name in "abcdef"})
    found = read_sharded_state_dict(index)
    tracemalloc.start()
    for name in found:
        assert found[name].shape == (2**20,)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 1.1 * 4 * 2**20
