"""Starting weights that depend on the seed and the model alone, not on how it is divided over processes."""

import hashlib

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.distributed.utils import local_tensor
from torchtitan.protocols.model import Decoder


@torch.no_grad()
def init_parameters(model: Decoder, seed: int, device: torch.device | str) -> None:
    """Fill the parameters of `model`, or a pipeline stage of one, as its weight_initializers() say.

    Every rank draws each parameter whole on `device`, by a generator that is seeded from the seed and the parameter's
    name, and copies its own shard to where the parameter is: no communication, and the peak is one whole parameter.
    Drawn is float32, whatever it is stored in. A GPU and a CPU draw different numbers from one seed.
    """
    initializers = model.weight_initializers()
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        generator = torch.Generator(device).manual_seed(_seed_for(seed, name))
        initializers[name](whole, generator)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        local_tensor(parameter).copy_(local_tensor(whole))


def _seed_for(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
