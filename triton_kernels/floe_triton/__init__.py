"""Routed low-rank experts (MoE-LoRA) as torch ops: usable in any stack, without floe.

``moe_lora`` is the fused frozen linear plus adapter; ``moe_lora_add`` adds the adapter to a base
output that something else computed; ``reference`` defines both in plain torch.
"""

from floe_triton import reference
from floe_triton.dropout import draw_seed, keyed_dropout
from floe_triton.functions import moe_lora, moe_lora_add, moe_lora_group, moe_lora_group_add

__all__ = [
    "draw_seed",
    "keyed_dropout",
    "moe_lora",
    "moe_lora_add",
    "moe_lora_group",
    "moe_lora_group_add",
    "reference",
]
