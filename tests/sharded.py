"""``torchrun sharded.py OUT``: gradients of an adapted model that FSDP2 shards over the workers."""

import sys

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from floe import FloeConfig, get_model

TOKENS = torch.arange(4, 36).view(4, 8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted():
    config = FloeConfig(r=3, num_experts=2, dropout=0.0, target_modules=TARGETS)
    model = get_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "floe_expand" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def gradients(model, tokens):
    """After the backward of the mean over rows; name -> gradient, whole."""
    model(input_ids=tokens).logits.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = adapted()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, TOKENS.chunk(world)[rank])
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
