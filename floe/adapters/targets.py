"""Which projections of a model an adapter wraps, how large it is there, which are wrapped."""

from __future__ import annotations

import math
from typing import Any, cast

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from floe.adapters.config import FloeConfig
from floe.adapters.linear import MoELoRALinear
from floe.adapters.shared_input import SharedInput, link, unlink
from floe.decoder_blocks import Block, base_of, find_blocks


def adapted_modules(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Path in the base model -> adapted layer, in the model's order."""
    base = base_of(model)
    return {path: m for path, m in base.named_modules() if isinstance(m, MoELoRALinear)}


def adapted_layers(model: nn.Module) -> dict[int, dict[str, MoELoRALinear]]:
    """Block index -> {projection name: adapted layer}, for the blocks that carry adapters."""
    modules = adapted_modules(model)
    layers = {
        block.index: {
            name: modules[path] for name, path in block.linears.items() if path in modules
        }
        for block in find_blocks(model)
    }
    return {index: adapted for index, adapted in layers.items() if adapted}


def link_shared_inputs(model: nn.Module) -> None:
    """Tell the adapted inputs of every block's attention and feed-forward of their siblings."""
    modules, base = adapted_modules(model), base_of(model)
    for block in find_blocks(model):
        for paths in (block.attention.values(), block.mlp.values()):
            adapted = [path for path in paths if path in modules]
            parents = {path.rpartition(".")[0] for path in adapted}
            members = [modules[path] for path in adapted]
            together = len(members) > 1 and len(parents) == 1
            shared = SharedInput(members) if together else None
            for member in members:
                member.shared = shared
            if together:
                link(base.get_submodule(parents.pop()))


def parameter_counts(model: nn.Module, config: FloeConfig) -> list[int]:
    """Adapter parameters of each block if it were adapted: r K + M N r + M K over its targets.

    Needs only shapes: works for models on the meta device. ``config.layers`` is ignored.
    """
    return [
        sum(
            math.prod(shape)
            for path in _block_targets(block, config.target_modules)
            for shape in config.at(path, block.index).shapes(linear_of(model, path)).values()
        )
        for block in find_blocks(model)
    ]


def projection_shapes(model: nn.Module, config: FloeConfig) -> list[dict[str, tuple[int, int]]]:
    """(in, out) features of each block's projections that ``config`` adapts, by name."""
    shapes = []
    for block in find_blocks(model):
        paths = _block_targets(block, config.target_modules)
        linears = {path.rpartition(".")[2]: linear_of(model, path) for path in paths}
        shapes.append({name: (m.in_features, m.out_features) for name, m in linears.items()})
    return shapes


def input_widths(model: nn.Module, config: FloeConfig) -> list[list[int]]:
    """In features of each block's projections that ``config`` adapts, were the block adapted."""
    return [[k for k, _ in block.values()] for block in projection_shapes(model, config)]


def adapter_shapes(model: nn.Module, config: FloeConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of ``config``'s adapter.

    A name is the path in the base model, then the parameter's name without the adapter's.
    """
    return {
        f"{path}.{name}.weight": shape
        for path, index in target_paths(model, config).items()
        for name, shape in config.at(path, index).shapes(linear_of(model, path)).items()
    }


def target_paths(model: nn.Module, config: FloeConfig) -> dict[str, int]:
    """Exact module path -> block index of every projection ``config`` adapts."""
    blocks = find_blocks(model)
    wanted = list(range(len(blocks))) if config.layers is None else config.layers
    beyond = [index for index in wanted if index >= len(blocks)]
    if beyond:
        raise ValueError(f"layers must be in [0, {len(blocks) - 1}] for this model, got {beyond}")
    return {
        path: block.index
        for block in blocks
        if block.index in set(wanted)
        for path in _block_targets(
            block, config.layer_modules.get(str(block.index), config.target_modules)
        )
    }


def feed_forward(block: Block) -> list[str]:
    """Names of a block's feed-forward projections, which are adapted where none are named."""
    return sorted(path.rpartition(".")[2] for path in (*block.mlp.values(), block.down_proj))


def _block_targets(block: Block, targets: list[str] | None) -> list[str]:
    linears, targets = block.linears, targets or feed_forward(block)
    unknown = sorted(set(targets) - linears.keys())
    if unknown:
        raise ValueError(
            f"target_modules must be among this model's projections {sorted(linears)}, "
            f"got {unknown}"
        )
    return [path for name, path in linears.items() if name in targets]


def by_path(name: str, pattern: dict[str, int], targets: dict[str, int]) -> dict[str, int]:
    """``{layer index or path: value}`` as ``{path: value}``, sorted; a path goes before its layer.

    Raises:
        ValueError: for a key that adapts nothing.
    """
    resolved: dict[str, int] = {}
    for key, value in sorted(pattern.items(), key=lambda entry: not entry[0].isdecimal()):
        paths = [p for p, index in targets.items() if key in (p, str(index))]
        if not paths:
            raise ValueError(f"{name} keys must be adapted layers or module paths, got {key!r}")
        resolved |= dict.fromkeys(paths, value)
    return dict(sorted(resolved.items()))


def linear_of(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at ``path`` of the base model, or what is wrapped there when it is adapted.

    Raises:
        ValueError: if it is no linear layer (nothing with ``in_features`` and ``out_features``).
    """
    module: Any = base_of(model).get_submodule(path)
    linear = module.get_base_layer() if isinstance(module, MoELoRALinear) else module
    if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
        raise ValueError(
            f"{path} must be a linear layer to be adapted, got {type(linear).__name__}"
        )
    return cast(nn.Linear, linear)  # or a quantised class that is shaped alike


# Where transformers keeps what PEFT has it put on the embeddings of a checkpointed base.
INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")


def remove_adapters(model: Any) -> nn.Module:
    """Take floe's adapters off; the base model is as it was before, and is returned."""
    base = base_of(model)
    for module in list(base.modules()):
        unlink(module)
        for name, child in list(module.named_children()):
            if isinstance(child, MoELoRALinear):
                setattr(module, name, child.base_layer)
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(module, name, child.unload_and_optionally_merge_module(False, False, None))
    _restore(base)
    return base


def _restore(base: nn.Module) -> None:
    """What the first adapter changed beside the modules."""
    before = base.__dict__.pop("_floe_base", None)
    if before is None:
        return
    for name in ("peft_config", "_floe_fingerprint"):
        base.__dict__.pop(name, None)
    if before["peft_config"] is not None:  # of another method
        base.peft_config = before["peft_config"]
    else:
        base.__dict__.pop("_hf_peft_config_loaded", None)
    for name in before["trainable"]:
        base.get_parameter(name).requires_grad_(True)
    hooks = before["hooks"].get(INPUT_HOOKS[0], [])
    for hook in vars(base).get(INPUT_HOOKS[0], []):
        if hook not in hooks:
            hook.remove()
    for name in INPUT_HOOKS:
        vars(base).pop(name, None)
    vars(base).update(before["hooks"])
