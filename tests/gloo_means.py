"""What `fully_shard` makes of gradients over gloo, for the scripts that train on several ranks.

torch 2.8 adds them there where it should take their mean.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def times_too_large(mesh: DeviceMesh) -> float:
    """Returns the gradient of a weight that is sharded over a mesh to its mean over the ranks."""
    layer = torch.nn.Linear(mesh.size(), 1, bias=False)
    fully_shard(layer, mesh=mesh)
    layer(torch.ones(1, mesh.size(), device=mesh.device_type)).sum().backward()
    return float(layer.weight.grad.full_tensor()[0, 0])
