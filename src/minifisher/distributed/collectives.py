"""Sums and gathers over process groups, and sharded tensors: the only file that uses torch.distributed."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Group = Any  # a process group; None is the default one, of all ranks

ALL_RANKS: tuple[Group, ...] = (None,)


def world_size() -> int:
    """The number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The piece of a DTensor that this process holds, not a copy; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cuts(tensor: Tensor) -> tuple[tuple[int, Group], ...]:
    """The dimensions along which a DTensor is cut, each with the group of ranks that hold the pieces."""
    if not is_distributed(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    partial = [placement for placement in placements if placement.is_partial()]
    if partial:
        raise ValueError(
            f"a parameter is placed as {placements}: a weight can be sharded or replicated, not a partial sum"
        )
    return tuple(
        (placement.dim, mesh.get_group(axis))
        for axis, placement in enumerate(placements)
        if hasattr(placement, "dim") and mesh.size(axis) > 1
    )


def cut_dimensions(tensor: Tensor) -> list[int]:
    """The dimensions along which a DTensor is cut, also where one process holds all pieces."""
    return [p.dim for p in tensor.placements if hasattr(p, "dim")]  # type: ignore[attr-defined]


def piece_units(tensor: Tensor) -> dict[int, int]:
    """For each dimension along which a DTensor is cut, a number of which every piece's start is a multiple.

    torch cuts n entries over k ranks into pieces of ceil(n / k), the last ones shorter. Where two dimensions
    of the mesh cut the same one, it depends on the kind of placement which of them comes first.
    """
    if not is_distributed(tensor):
        return {}
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    sharding = [(p.dim, mesh.size(axis)) for axis, p in enumerate(placements) if hasattr(p, "dim")]
    units = dict.fromkeys((dimension for dimension, _ in sharding), 0)
    for order in (sharding, sharding[::-1]):
        lengths = list(tensor.shape)
        for dimension, ranks in order:
            lengths[dimension] = math.ceil(lengths[dimension] / ranks)
            units[dimension] = math.gcd(units[dimension], lengths[dimension])
    return units


def sum_over_ranks(tensors: Iterable[tuple[Tensor, tuple[Group, ...]]]) -> bool:
    """Sum each tensor over its groups, in place and in one call; returns whether every sum is finite."""
    buckets: dict[Any, list[Tensor]] = defaultdict(list)
    groups_of: dict[Any, tuple[Group, ...]] = {}
    for tensor, groups in tensors:
        key = (tuple(map(id, groups)), tensor.dtype, tensor.device)
        buckets[key].append(tensor)
        groups_of[key] = groups
    finite = True
    for key, members in buckets.items():
        flat = torch.cat([tensor.flatten() for tensor in members])
        for group in groups_of[key]:
            dist.all_reduce(flat, group=group)
        finite &= bool(torch.isfinite(flat).all())
        for tensor, part in zip(members, torch.split(flat, [t.numel() for t in members]), strict=True):
            tensor.copy_(part.view(tensor.shape))
    return finite


def copy_from_owners(tensors: Sequence[tuple[Tensor, int]]) -> None:
    """Copy every tensor from its owner to all ranks, in place and with one call for each dtype.

    A gather sends from every rank as much as from the rank that owns most. If that is more than twice the
    size of all tensors (with fewer tensors than ranks, for example), a sum sends less: ranks that do not own
    a tensor add zeros.
    """
    by_dtype: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, int]]] = defaultdict(list)
    for tensor, owner in tensors:
        by_dtype[tensor.dtype, tensor.device].append((tensor, owner))
    for members in by_dtype.values():
        owned: list[list[Tensor]] = [[] for _ in range(world_size())]
        for tensor, owner in members:
            owned[owner].append(tensor)
        shares = [sum(tensor.numel() for tensor in theirs) for theirs in owned]
        if max(shares) * world_size() <= 2 * sum(shares):
            _gather(owned, max(shares))
        else:
            _sum_with_zeros(members)


def _gather(owned: Sequence[list[Tensor]], length: int) -> None:
    mine = next(tensor for theirs in owned for tensor in theirs).new_zeros(length)
    parts = [tensor.flatten() for tensor in owned[rank()]]
    if parts:
        torch.cat(parts, out=mine[: sum(part.numel() for part in parts)])
    received = [torch.empty_like(mine) for _ in owned]
    dist.all_gather(received, mine)
    for theirs, flat in zip(owned, received, strict=True):
        start = 0
        for tensor in theirs:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def _sum_with_zeros(members: Sequence[tuple[Tensor, int]]) -> None:
    for tensor, owner in members:
        if owner != rank():
            tensor.zero_()
    sum_over_ranks((tensor, ALL_RANKS) for tensor, _ in members)


# ---- pieces in checkpoints ----


def as_dtensor(held: Tensor, like: Tensor, axes: Mapping[int, int | None], shape: Sequence[int]) -> Tensor:
    """This rank's piece as a DTensor of `shape`, which torch.distributed.checkpoint can save and reshard.

    `like` is the parameter. `axes` maps each dimension along which the parameter is cut to the dimension
    along which this tensor is cut, or to None.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = []
    for placement in like.placements:  # type: ignore[attr-defined]
        axis = axes.get(placement.dim) if hasattr(placement, "dim") else None
        placements.append(Replicate() if axis is None else Shard(axis))
    stride = torch.empty(tuple(shape), device="meta").stride()
    mesh = like.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = DTensor.from_local(
        held, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return whole
