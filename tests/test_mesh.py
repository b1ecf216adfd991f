"""The mesh: as many devices as asked for, a batch in equal consecutive parts, and errors that say what to change."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.mesh import make_mesh, put_batch, replicated, require_divisible, round_up


class Pair(NamedTuple):
    images: np.ndarray
    labels: np.ndarray


@pytest.mark.parametrize(("asked", "got"), [(None, 8), (1, 1), (3, 3), (8, 8)])
def test_a_mesh_has_the_devices_asked_for(asked, got):
    mesh = make_mesh(asked)
    assert list(mesh.devices.flat) == jax.devices()[:got]


@pytest.mark.parametrize("asked", [9, 0, -1])
def test_a_number_of_devices_that_is_not_there_is_one_sentence(asked):
    with pytest.raises(InputError, match=rf"--devices must lie in 1\.\.8 on this machine, got {asked}$"):
        make_mesh(asked)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="JAX was started as 2 processes"):
        make_mesh()


@pytest.mark.parametrize(
    ("batch_size", "devices", "parts", "fix"), [(12, 8, 1, 8), (24, 8, 2, 16), (3, 1, 2, 2), (1, 8, 1, 8)]
)
def test_a_batch_that_does_not_split_names_flag_value_and_fix(batch_size, devices, parts, fix):
    with pytest.raises(
        InputError, match=rf"--batch-size {batch_size} .*{devices} devices.* multiple of {fix}$"
    ) as caught:
        require_divisible(batch_size, make_mesh(devices), "--batch-size", parts)
    # Accumulation is only blamed where there is some.
    assert ("accumulation" in str(caught.value)) == (parts > 1)


@pytest.mark.parametrize(("batch_size", "devices", "parts"), [(16, 8, 2), (8, 8, 1), (7, 1, 1), (9, 3, 3)])
def test_a_batch_that_splits_is_let_through(batch_size, devices, parts):
    require_divisible(batch_size, make_mesh(devices), "--batch-size", parts)


@pytest.mark.parametrize(("number", "devices", "batch"), [(1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5), (128, 3, 129)])
def test_a_batch_is_rounded_up_to_one_that_splits(number, devices, batch):
    assert round_up(number, make_mesh(devices)) == batch


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_device_holds_its_own_consecutive_share(devices):
    batch = Pair(np.random.default_rng(0).standard_normal((16, 2, 3)).astype(np.float32), np.arange(16, dtype=np.int32))
    mesh = make_mesh(devices)
    placed = put_batch(batch, mesh)
    assert type(placed) is Pair
    for host, leaf in zip(batch, placed):
        np.testing.assert_array_equal(leaf, host)
        assert leaf.dtype == host.dtype
        held = {shard.device: np.asarray(shard.data) for shard in leaf.addressable_shards}
        for device, share in zip(mesh.devices.flat, np.split(host, devices), strict=True):
            np.testing.assert_array_equal(held[device], share)


def test_replicated_gives_every_device_everything():
    array = np.arange(5.0, dtype=np.float32)
    placed = jax.device_put(array, replicated(make_mesh(8)))
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, array)
