"""``torchrun sharded.py OUT``: an adapted model that the workers share.

Its gradients under FSDP2, and what a step makes of the adapter under FSDP1 with PEFT's wrap policy,
which flattens parameters: float64 base, float32 adapters.
"""

import sys

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from floe import FloeConfig, get_model
from helpers.tiny import tiny_model

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


def step(model, tokens):
    """One large step of gradient descent."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e3)
    model(input_ids=tokens).logits.float().square().mean().backward()
    optimizer.step()


def wide_base():
    model = adapted()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.double()
    return model


def flattened(tokens):
    """The adapter's tensors after :func:`step` under FSDP1, on every worker."""
    model = wide_base()
    whole = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        device_id=torch.device("cpu"),
        use_orig_params=False,
    )
    step(whole, tokens)
    return get_peft_model_state_dict(model, whole.state_dict())


def main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = adapted()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, TOKENS.chunk(world)[rank])
    stepped = flattened(TOKENS.chunk(world)[rank])
    if rank == 0:
        torch.save((found, stepped), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
