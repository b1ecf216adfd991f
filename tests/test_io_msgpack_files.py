"""Msgpack files against flax's own reader and writer, and what is refused."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from jaxdiff.errors import InputError
from jaxdiff.io.msgpack_files import read_msgpack

TREE = {
    "conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, ml_dtypes.bfloat16)},
    "number": np.asarray(2.5, np.float16),
    "none": np.zeros((0, 2), np.float32),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_the_same_tree_as_flax_reads(tmp_path):
    path = tmp_path / "a.msgpack"
    path.write_bytes(serialization.msgpack_serialize(TREE))
    assert_same(read_msgpack(path), TREE)
    assert_same(read_msgpack(path), serialization.msgpack_restore(path.read_bytes()))


def test_arrays_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
    path = tmp_path / "a.msgpack"
    path.write_bytes(serialization.msgpack_serialize(TREE))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert_same(read_msgpack(path), TREE)


WHOLE = serialization.msgpack_serialize(TREE)
LONE = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((2,), "O", bytes(16))))})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (WHOLE[:-3], "truncated, or not a msgpack file of flax"),
        (b"", "truncated, or not a msgpack file of flax"),
        (WHOLE + b"\x00", "1 bytes follow its end"),
        (b"\xc1", "truncated, or not a msgpack file of flax"),
        (b"\xdf\xff\xff\xff\xff", "truncated, or not a msgpack file of flax"),
        (b"\x81" * 5000, "truncated, or not a msgpack file of flax"),
        (LONE, "truncated, or not a msgpack file of flax"),
        (msgpack.packb({"a": msgpack.ExtType(9, b"x")}), "an extension of type 9"),
        (msgpack.packb([1]), "must hold a tree of parameters, holds a list"),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "truncated, or not a msgpack file of flax"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, data, sentence):
    path = tmp_path / "a.msgpack"
    path.write_bytes(data)
    with pytest.raises(InputError, match=sentence) as caught:
        read_msgpack(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read .No such file"):
        read_msgpack(tmp_path / "a.msgpack")
