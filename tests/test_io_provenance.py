"""The command line can be pasted, and a hash tells apart whatever differs."""

import re
import shlex
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.io import provenance

PACKAGE = Path(jaxdiff.__file__).parent


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (str(PACKAGE / "train_cfg.py"), ["python", "-m", "jaxdiff.train_cfg"]),
        (str(PACKAGE / "__main__.py"), ["python", "-m", "jaxdiff"]),
        ("/somewhere/bin/jaxdiff", ["jaxdiff"]),
        ("scripts/benchmark.py", ["python", "scripts/benchmark.py"]),
    ],
)
def test_command_line_can_be_pasted_into_a_shell(monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", [program, "--out", "my runs/$x"])
    assert shlex.split(provenance.command_line()) == [*words, "--out", "my runs/$x"]


# Hashes


def tree():
    return {"conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3, np.float32)}}


def test_hash_depends_on_values_alone():
    reordered = {"conv": dict(reversed(list(tree()["conv"].items())))}
    on_device = {"conv": {name: jnp.asarray(value) for name, value in tree()["conv"].items()}}
    strided = {"conv": {**tree()["conv"], "kernel": np.asfortranarray(tree()["conv"]["kernel"])}}
    same = {provenance.tree_hash(t) for t in (tree(), reordered, on_device, strided)}
    assert len(same) == 1
    assert re.fullmatch("[0-9a-f]{64}", same.pop())


def test_hash_changes_with_every_single_bit():
    base = tree()
    seen = {provenance.tree_hash(base)}
    kernel = base["conv"]["kernel"]
    for bit in range(kernel.nbytes * 8):
        raw = bytearray(kernel.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(raw), np.float32).reshape(kernel.shape)
        seen.add(provenance.tree_hash({"conv": {**base["conv"], "kernel": flipped}}))
    assert len(seen) == 1 + kernel.nbytes * 8


def test_hash_tells_apart_whatever_differs_but_in_values():
    one = np.ones(1, np.float32)
    trees = [
        {"a": one},
        {"b": one},
        {"a": one.reshape(())},
        {"a": one.reshape(1, 1)},
        {"a": one.view(np.int32)},
        {"a": one.view(np.uint32)},
        {"a": one.astype(jnp.bfloat16)},
        {"a": {"b": one}},
        {"a/b": one},
        {"a": {"b": one}, "c": {}},
        {"a": one, "b": one},
        {"a": {"a": one}, "b": one},
        {"a": {"a": one, "b": one}},
        {},
        {"a": {}},
    ]
    assert len({provenance.tree_hash(t) for t in trees}) == len(trees)


@pytest.mark.parametrize("leaf", [None, object()])
def test_hash_refuses_what_has_no_bytes_of_its_own(leaf):
    with pytest.raises(TypeError, match="a/b"):
        provenance.tree_hash({"a": {"b": leaf}})


# Metrics
