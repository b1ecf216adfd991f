"""The device mesh: the only place that knows how many devices there are.

The batch is split over the axes "data" and "fsdp" together. Small parameters are replicated; large ones, and all that
has their shape (their average, the optimizer's moments), are split over "fsdp", which has size 1 unless it is asked for
(ZeRO, arXiv 1910.02054; FSDP, arXiv 2304.11277). Programs are written for the whole batch and whole parameters, and
jit places them (automatic sharding), so one device, eight, and several processes run the same code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff import processes
from jaxdiff.device_settings import DeviceSettings, ProcessSettings
from jaxdiff.errors import InputError

BATCH = PartitionSpec(("data", "fsdp"))
LARGE = 2**14
"""Numbers in an array from which on it is split; a smaller one costs more to gather than to keep."""


def open_mesh(settings: DeviceSettings) -> Mesh:
    """Join the other processes, where there are any, and return the mesh over the devices of all.

    Raises:
      InputError: the processes cannot be joined, or the devices are not there.
    """
    if isinstance(settings, ProcessSettings):
        processes.join(settings)
    return make_mesh(*settings.axes)


def make_mesh(num_data: int | None = None, num_fsdp: int = 1) -> Mesh:
    """Return a mesh over the first `num_data` x `num_fsdp` devices; None means as many as there are.

    Raises:
      InputError: there are fewer devices than asked for, or those of several processes are not all taken.
    """
    devices = jax.devices()
    wanted = f"--mesh data={'...' if num_data is None else num_data},fsdp={num_fsdp}"
    if num_data is None:
        if len(devices) % num_fsdp:
            raise InputError(f"{wanted}: {len(devices)} devices do not divide by {num_fsdp}")
        num_data = len(devices) // num_fsdp
    total = num_data * num_fsdp
    if num_fsdp == 1 and not 1 <= total <= len(devices):
        raise InputError(f"--devices must lie in 1..{len(devices)} on this machine, got {total}")
    if not 1 <= total <= len(devices):
        raise InputError(f"{wanted} needs {total} devices, but there are {len(devices)}")
    if total < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"{total} devices: the {jax.process_count()} processes have {len(devices)}, and each must take part with "
            "all of its own; leave --devices out, or start fewer processes"
        )
    return _mesh_of(devices[:total], num_fsdp)


def own_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh of this process's devices alone, for work that is split by hand; alone, the mesh itself."""
    if jax.process_count() == 1:
        return mesh
    parts = mesh.shape["fsdp"]
    return _mesh_of(jax.local_devices(), parts if jax.local_device_count() % parts == 0 else 1)


def _mesh_of(devices: list[Any], num_fsdp: int) -> Mesh:
    shape = len(devices) // num_fsdp, num_fsdp
    return Mesh(np.asarray(devices).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_split(mesh: Mesh) -> NamedSharding:
    """Sharding that splits an array's leading axis over the devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def device_name(mesh: Mesh) -> str:
    """Return the number and the kind of the devices, as records give them."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def split_large(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a state, by its shape alone, so that all that belongs together lies alike.

    An array of at least `LARGE` numbers is split over "fsdp" along its longest axis that divides; the rest lies on all.

    Args:
      tree: arrays, or their shapes.
      mesh: devices.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or leaf.size < LARGE or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(place, tree)


def require_divisible(batch_size: int, mesh: Mesh, flag: str, parts: int = 1) -> None:
    """Raise InputError unless the batch splits evenly over `parts` micro-batches and all devices."""
    pieces = mesh.size * parts
    if batch_size % pieces:
        raise InputError(
            f"{flag} {batch_size} does not split over {mesh.size} devices"
            + (f" and {parts} accumulation steps" if parts > 1 else "")
            + f": use a multiple of {pieces}"
        )


def round_up(number: int, mesh: Mesh) -> int:
    """Return the smallest batch of at least `number` that splits evenly over all devices."""
    return -(-number // mesh.size) * mesh.size


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Place this process's share of a batch (a tree of NumPy arrays) on its devices, split over the batch axis."""
    sharding = batch_split(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def put_whole(batch: Any, mesh: Mesh) -> Any:
    """Place a batch that every process holds whole, split over the batch axis."""
    sharding = batch_split(mesh)

    def put(leaf: Any) -> jax.Array:
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda place: np.asarray(leaf)[place])

    return jax.tree.map(put, batch)


def bring_home(tree: Any, mesh: Mesh) -> Any:
    """Return arrays that lie on the devices of several processes on this process's `own_mesh` alone."""
    if jax.process_count() == 1:
        return tree
    gathered = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    whole = jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered)
    return jax.device_put(whole, split_large(whole, own_mesh(mesh)))


def own_copy(tree: Any) -> Any:
    """Return arrays that every device holds whole as this process's alone, without asking the others."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def any_process(flag: bool, mesh: Mesh) -> bool:
    """Tell whether the flag is set in any process; every one of them waits here for the answer."""
    if jax.process_count() == 1:
        return flag
    share = np.full(mesh.local_mesh.size, flag)
    return bool(jax.jit(jnp.any, out_shardings=replicated(mesh))(put_batch(share, mesh)))


class AgreedStop:
    """A request to stop that all processes hear at the same step; alone, one's own, at once.

    With others, each says after every step whether it was asked, and hears whether any of them was, a step ago: so
    nobody waits for the answer.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked = asked
        self._mesh = mesh
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self._waiting: jax.Array | None = None
        self._agreed = False

    @property
    def requested(self) -> bool:
        """Whether all are to stop now."""
        return self._asked() if jax.process_count() == 1 else self._agreed

    def ask(self) -> None:
        """Exchange requests; every process calls it after every step."""
        if jax.process_count() > 1:
            share = np.full(self._mesh.local_mesh.size, self._asked())
            answer, self._waiting = self._waiting, self._any(put_batch(share, self._mesh))
            self._agreed = answer is not None and bool(answer)
