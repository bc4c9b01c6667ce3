"""Tiny models with a floe adapter whose experts hold values, as after training."""

import torch

from floe.adapters import FloeConfig, adapted_modules, get_model
from helpers.importance_models import plain

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def trained(model, name="default", seed=5):
    """Give the experts values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(model).values():
        if name in module.floe_expand:
            expand = module.floe_expand[name].weight
            expand.data.copy_(torch.randn(expand.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def adapted(kind="llama", **settings):
    return trained(get_model(plain(kind), FloeConfig(**{"r": 3, "num_experts": 2} | settings)))
