"""The mesh: as many devices as asked for, a batch in equal consecutive parts, and errors that say what to change."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxdiff.device_settings import DeviceSettings, ProcessSettings
from jaxdiff.errors import InputError
from jaxdiff.mesh import (
    LARGE,
    make_mesh,
    open_mesh,
    put_batch,
    put_whole,
    replicated,
    require_divisible,
    round_up,
    split_large,
)


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


def test_each_of_several_processes_takes_part_with_all_its_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make_mesh().size == 8
    with pytest.raises(InputError, match="4 devices: the 2 processes have 8"):
        make_mesh(4)


@pytest.mark.parametrize(
    ("flag", "shape"), [("data=8", (8, 1)), ("data=4,fsdp=2", (4, 2)), ("fsdp=4", (2, 4)), ("data=1,fsdp=3", (1, 3))]
)
def test_the_flag_says_how_many_devices_lie_along_each_axis(flag, shape):
    mesh = open_mesh(DeviceSettings(mesh=flag))
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))
    assert list(mesh.devices.flat) == jax.devices()[: shape[0] * shape[1]]


@pytest.mark.parametrize("flag", ["", ",", "8", "data=0", "fsdp=2,data=4", "data=4,", "data=4,fsdp=two", "model=2"])
def test_a_mesh_that_cannot_be_read_is_one_sentence(flag):
    with pytest.raises(InputError, match=f"--mesh must be like data=8 or data=4,fsdp=2, got '{flag}'$"):
        DeviceSettings(mesh=flag)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("data=4,fsdp=4", "needs 16 devices, but there are 8"), ("fsdp=3", "8 devices do not divide by 3")],
)
def test_a_mesh_of_more_devices_than_there_are_is_one_sentence(flag, sentence):
    with pytest.raises(InputError, match=sentence):
        open_mesh(DeviceSettings(mesh=flag))


@pytest.mark.parametrize("flag", ["host", "host:1", "host:1,2", "host:1,2,2", "host:1,0,0", "host:x,2,0", "autos"])
def test_processes_that_cannot_be_read_are_one_sentence(flag):
    with pytest.raises(InputError, match=f"--distributed must be auto or HOST:PORT,N,I .*, got '{flag}'$"):
        ProcessSettings(distributed=flag)


def test_an_array_is_split_along_its_longest_axis_that_divides_if_it_is_large():
    shapes = {
        (128, 256): (None, "fsdp"),
        (256, 128): ("fsdp",),
        (3, 3, 512, 512): (None, None, "fsdp"),
        (257, 128): (None, "fsdp"),
        (129, 127): (),
        (4, 4): (),
        (LARGE,): ("fsdp",),
        (): (),
    }
    mesh = make_mesh(4, 2)
    found = split_large({shape: jax.ShapeDtypeStruct(shape, "float32") for shape in shapes}, mesh)
    assert {shape: tuple(sharding.spec) for shape, sharding in found.items()} == shapes
    # With one device along the axis there is nothing to split.
    whole = split_large(jax.ShapeDtypeStruct((256, 256), "float32"), make_mesh(8))
    assert tuple(whole.spec) == ()


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


@pytest.mark.parametrize("put", [put_batch, put_whole])
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (8, 1), (4, 2), (1, 8)])
def test_every_device_holds_its_own_consecutive_share(put, devices, fsdp):
    batch = Pair(np.random.default_rng(0).standard_normal((16, 2, 3)).astype(np.float32), np.arange(16, dtype=np.int32))
    mesh = make_mesh(devices, fsdp)
    placed = put(batch, mesh)
    assert type(placed) is Pair
    for host, leaf in zip(batch, placed):
        np.testing.assert_array_equal(leaf, host)
        assert leaf.dtype == host.dtype
        held = {shard.device: np.asarray(shard.data) for shard in leaf.addressable_shards}
        for device, share in zip(mesh.devices.flat, np.split(host, mesh.size), strict=True):
            np.testing.assert_array_equal(held[device], share)


def test_replicated_gives_every_device_everything():
    array = np.arange(5.0, dtype=np.float32)
    placed = jax.device_put(array, replicated(make_mesh(8)))
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, array)
