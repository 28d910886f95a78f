"""The device mesh of a layout: every axis of config/degrees.py, and the combinations that parallelisms share."""

import warnings

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.degrees import ParallelDims

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The mesh's axes, outermost first: the ranks of one tp group are neighbours, those of one pp group far apart."""


def build_mesh(dims: ParallelDims, device_type: str) -> "Mesh":
    """The mesh of this layout; a collective call."""
    shape = (dims.pp, dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp)
    return Mesh(init_device_mesh(device_type, shape, mesh_dim_names=AXES))


class Mesh:
    """The ranks by axis. Every axis is there, also where its size is 1.

    mesh["tp"] and so on for each of AXES; besides them
    | dp           | dp_replicate x dp_shard      | ranks that read different sequences           |
    | dp_shard_cp  | dp_shard x cp                | ranks over which FSDP shards the weights      |
    | hsdp         | dp_replicate, dp_shard x cp  | two-dimensional: copies of those shards       |
    """

    def __init__(self, root: DeviceMesh):
        self.device_type = root.device_type
        self._axes = {axis: root[axis] for axis in AXES}
        self._axes["dp"] = _join(root, "dp_replicate", "dp_shard", name="dp")
        self._axes["dp_shard_cp"] = shards = _join(root, "dp_shard", "cp", name="dp_shard_cp")
        assert shards.mesh_dim_names is not None
        with warnings.catch_warnings():
            # torch asks to keep flattened axes oneself, as is done above, but has no public way yet to pair one up.
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            self._axes["hsdp"] = root["dp_replicate", shards.mesh_dim_names[0]]

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self._axes[axis]

    def is_first(self, *axes: str) -> bool:
        """Whether this rank comes first on each of the axes."""
        return all(self[axis].get_local_rank() == 0 for axis in axes)

    def get_groups(self) -> list[ProcessGroup]:
        """The process groups that this rank is in; one may be that of several axes."""
        return list({mesh.get_group(): None for axis, mesh in self._axes.items() if axis != "hsdp"})


def _join(root: DeviceMesh, first: str, second: str, *, name: str) -> DeviceMesh:
    """Two axes as one; where one of them has a single rank, the other one, which needs no communicator of its own."""
    for axis, other in ((first, second), (second, first)):
        if root[other].size() == 1:
            return root[axis]
    return root[first, second]._flatten(name)
