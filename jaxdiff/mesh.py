"""The device mesh: the only place that knows how many devices there are.

The batch is split over the axis "data"; parameters are replicated. Programs are written for the whole batch and
jit places them (automatic sharding), so one device and eight run the same code.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.errors import InputError


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Return a one-axis mesh over the first `num_devices` devices; None means all of them.

    Raises:
      InputError: there are fewer devices than asked for, or several processes.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"one process serves all devices of one machine, but JAX was started as {jax.process_count()} processes"
        )
    devices = jax.devices()
    num_devices = len(devices) if num_devices is None else num_devices
    if not 1 <= num_devices <= len(devices):
        raise InputError(f"--devices must lie in 1..{len(devices)} on this machine, got {num_devices}")
    return Mesh(np.asarray(devices[:num_devices]), ("data",), axis_types=(AxisType.Auto,))


def batch_split(mesh: Mesh) -> NamedSharding:
    """Sharding that splits an array's leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


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
