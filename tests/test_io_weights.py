"""Safetensors files against the safetensors package and torch, and every way in which a file can be wrong."""

import gc
import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import load_file, save_file

from jaxdiff.errors import InputError
from jaxdiff.io.weights import (
    MAX_HEADER_BYTES,
    LazyTensors,
    check_specs,
    flatten_params,
    load_params,
    read_safetensors,
    unflatten_params,
    write_safetensors,
)

TREE = {"conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_reads_what_torch_wrote(tmp_path):
    tensors = {str(dtype): torch.tensor([[0.0, 1.0], [2.5, 1.0]]).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "a.safetensors", {"by": "torch"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.metadata == {"by": "torch"}
    assert found.specs["torch.bfloat16"] == ((2, 2), "bfloat16")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype.name) == found.specs[name]
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())


def test_torch_reads_what_we_wrote(tmp_path):
    tensors = {
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "number": np.asarray(3.0, ml_dtypes.bfloat16),
        "none": np.zeros((0, 2), np.float16),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
        "turned": "torch.float32",
        "number": "torch.bfloat16",
        "none": "torch.float16",
    }
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].double().numpy(), tensor.astype(np.float64))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, flatten_params(TREE))
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        write_safetensors(path, {"a": np.array([object()])})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_same_bytes_as_the_package_writes(tmp_path):
    tensors = {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.ones(3, np.float32),
        "half": np.ones((2, 1), np.float16),
        "ids": np.arange(3),
        "é": np.asarray(1, np.float32),
    }
    for metadata in (None, {"format": "pt"}):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
        assert (tmp_path / "a.safetensors").read_bytes() == save(tensors, metadata)


def test_a_write_asks_for_one_tensor_after_another(tmp_path):
    alive: list[weakref.ref] = []

    def read(name):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        array = np.full(1000, int(name), np.float32)
        alive.append(weakref.ref(array))
        return array

    lazy = LazyTensors({str(i): ((1000,), "float32") for i in range(5)}, read)
    write_safetensors(tmp_path / "a.safetensors", lazy)
    assert len(alive) == 5
    assert {name: tensor[0] for name, tensor in read_safetensors(tmp_path / "a.safetensors").items()} == {
        str(i): i for i in range(5)
    }
    with pytest.raises(KeyError):
        lazy["9"]


def test_names_lead_back():
    assert unflatten_params(flatten_params(TREE)) == TREE
    assert list(flatten_params(TREE)) == ["conv.kernel", "conv.bias"]
    with pytest.raises(InputError, match=r"'a\.b' must be a word without dots"):
        flatten_params({"a.b": 1})
    for names, sentence in [
        (["a", "a.b"], r"'a\.b' goes through 'a', which is a tensor itself"),
        (["a.b", "a"], "'a' is both a tensor and the beginning of other names"),
        (["a..b"], r"'a\.\.b' has an empty part"),
    ]:
        with pytest.raises(InputError, match=sentence):
            unflatten_params(dict.fromkeys(names, 0))


# --- files that are wrong


def huge_header(path):
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)  # a hole, which takes no disk
    return f"a header of {MAX_HEADER_BYTES + 1:,} bytes, more than"


def header_beyond_the_end(path):
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    return "truncated, or not a safetensors file"


def empty(path):
    path.write_bytes(b"")
    return r"truncated, or not a safetensors file \(0 bytes\)"


def cut_short(path):
    write_safetensors(path, flatten_params(TREE))
    path.write_bytes(path.read_bytes()[:-4])
    return "truncated: [0-9]+ bytes of [0-9]+; download it again"


def name_twice(path):
    one = json.dumps(entry([1], 0, 4))
    write_raw(path, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4))
    return "the name 'a' stands there twice"


def no_json(path):
    write_raw(path, b"\xff\xfe{")
    return "its header cannot be read"


def deep_json(path):
    write_raw(path, b'{"a":' * 200_000)
    return "its header cannot be read"


def no_object(path):
    write_raw(path, [1, 2])
    return "a list instead of an object"


def no_entry(path):
    write_raw(path, {"a": 3})
    return "its header cannot be read"


def dtype_no_text(path):
    write_raw(path, {"a": entry([1], 0, 4, dtype=["F32"])}, bytes(4))
    return "a is of dtype .'F32'., which is not supported"


def size_without_shape(path):
    write_raw(path, {"a": entry([2], 0, 4)}, bytes(4))
    return "not a sound safetensors file"


def overlap(path):
    write_raw(path, {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4))
    return "not a sound safetensors file"


def unknown_dtype(path):
    write_raw(path, {"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4))
    return "a is of dtype F8_E4M3, which is not supported"


def absent(path):
    return "cannot be read .No such file"


@pytest.mark.parametrize(
    "spoil",
    [
        huge_header,
        header_beyond_the_end,
        empty,
        cut_short,
        name_twice,
        no_json,
        deep_json,
        no_object,
        no_entry,
        dtype_no_text,
        size_without_shape,
        overlap,
        unknown_dtype,
        absent,
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, spoil):
    path = tmp_path / "a.safetensors"
    sentence = spoil(path)
    with pytest.raises(InputError, match=sentence) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# --- several files


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_several_files_are_read_as_one(tmp_path):
    write_safetensors(tmp_path / "1.safetensors", {"a": np.ones(2)})
    write_safetensors(tmp_path / "2.safetensors", {"b": np.zeros(3, np.float32)})
    found = read_safetensors(write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert found.specs == {"a": ((2,), "float64"), "b": ((3,), "float32")}
    np.testing.assert_array_equal(found["a"], [1, 1])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"a": "../1.safetensors"}, r"names '../1.safetensors', but may only name safetensors files beside itself"),
        ({"a": "/etc/x.safetensors"}, "may only name"),
        ({"a": "1.pkl"}, "may only name"),
        ({"a": 3}, "may only name"),
        ({"a": "1.safetensors", "b": "9.safetensors"}, r"missing beside it: 9\.safetensors"),
        ({"a": "1.safetensors"}, "not listed: extra"),
        ({"a": "1.safetensors", "extra": "1.safetensors", "c": "1.safetensors"}, "not where it says: c"),
        ({"a": "1.safetensors", "extra": "2.safetensors"}, "in two files: extra"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_one_sentence(tmp_path, weight_map, sentence):
    write_safetensors(tmp_path / "1.safetensors", {"a": np.ones(2), "extra": np.ones(2)})
    write_safetensors(tmp_path / "2.safetensors", {"extra": np.ones(2)})
    with pytest.raises(InputError, match=sentence):
        read_safetensors(write_index(tmp_path, weight_map))


# --- parameters


def test_parameters_that_fit_are_read(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", flatten_params(TREE))
    params = load_params(tmp_path / "a.safetensors", TREE)
    np.testing.assert_array_equal(params["conv"]["kernel"], TREE["conv"]["kernel"])
    assert params.keys() == TREE.keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conv.bias": None}, r"\(missing: conv\.bias\)"),
        ({"conv.more": np.ones(1)}, r"\(not expected: conv\.more\)"),
        ({"conv.bias": np.ones(4, np.float32)}, r"conv\.bias is float32\[4\] instead of float32\[3\]"),
        ({"conv.bias": np.ones(3, np.float16)}, r"conv\.bias is float16\[3\] instead of float32\[3\]"),
        ({"conv.bias": np.array([1, np.nan, 2], np.float32)}, r"conv\.bias holds NaN or infinity"),
        ({"conv.bias": np.array([-np.inf, np.inf, 2], np.float32)}, r"conv\.bias holds NaN or infinity"),
    ],
)
def test_parameters_that_do_not_fit_are_listed(tmp_path, change, sentence):
    flat = {name: value for name, value in {**flatten_params(TREE), **change}.items() if value is not None}
    write_safetensors(tmp_path / "a.safetensors", flat)
    with pytest.raises(InputError, match=sentence):
        load_params(tmp_path / "a.safetensors", TREE)


def test_large_finite_numbers_are_no_infinity(tmp_path):
    tree = {"a": np.full(8, 3e38, np.float32)}
    write_safetensors(tmp_path / "a.safetensors", tree)
    np.testing.assert_array_equal(load_params(tmp_path / "a.safetensors", tree)["a"], tree["a"])


def test_a_long_list_of_faults_ends_in_a_count():
    wanted = {f"w{i}": ((1,), "float32") for i in range(20)}
    with pytest.raises(InputError, match=r"missing: w0, w1, .* and 12 more; not expected: other"):
        check_specs("file", {"other": ((1,), "float32")}, wanted)
