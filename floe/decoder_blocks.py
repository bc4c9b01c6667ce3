"""The decoder blocks of a model and where masks and adapters sit in them, by exact module path.

A block's index is its place in the model's own list of blocks; no pattern is ever matched against a
name to find a number. Known layouts: Llama 2/3, SmolLM, Mistral, Qwen2/3, Gemma 1/2/3, Phi-3 and
whatever names its projections alike; another model's blocks are described by hand:
``model.floe_block_names = BlockNames(...)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class BlockNames:
    """Names inside one block, relative to it: each entry lists alternatives, first match wins.

    ``blocks`` is the path of the list of blocks in the model; needed where several lists fit.
    """

    blocks: str | None = None
    attention_output: tuple[str, ...] = (
        "self_attn.o_proj",
        "attention.o_proj",
        "self_attn.out_proj",
    )
    attention_inputs: tuple[dict[str, str], ...] = (
        {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        {"qkv": "self_attn.qkv_proj"},
    )
    mlp_output: tuple[str, ...] = ("mlp.down_proj", "feed_forward.down_proj")
    mlp_inputs: tuple[dict[str, str], ...] = (
        {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        {"gate_up": "mlp.gate_up_proj"},
    )


@dataclass(frozen=True)
class Block:
    """One decoder block: its index, its path in the model, and the paths of its projections."""

    index: int
    path: str
    module: nn.Module = field(repr=False, compare=False)
    o_proj: str
    down_proj: str
    attention: dict[str, str]
    mlp: dict[str, str]

    @property
    def linears(self) -> dict[str, str]:
        """Last name component -> full path of every projection of this block."""
        paths = [*self.attention.values(), self.o_proj, *self.mlp.values(), self.down_proj]
        return {path.rpartition(".")[2]: path for path in paths}


@dataclass(frozen=True)
class Geometry:
    """Sizes the masks need.

    ``neurons`` is the FFN width, ``head_dim`` times ``heads`` o_proj's input.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    hidden: int


def base_of(model: nn.Module) -> nn.Module:
    """The plain model inside a PeftModel, or the model itself.

    Its module paths are what blocks speak of.
    """
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_blocks(model: nn.Module) -> list[Block]:
    """Decoder blocks in order, with paths relative to :func:`base_of` ``(model)``.

    Projections are looked for under the names in the base model's attribute ``floe_block_names``,
    a :class:`BlockNames`, where it has one: everything that asks for blocks asks here.

    Raises:
        ValueError: when no list of blocks has the projections looked for, or several have, or one
            of an encoder-decoder and ``blocks`` does not say that it is meant; the text names them.
    """
    base = base_of(model)
    names = getattr(base, "floe_block_names", None) or BlockNames()
    # An encoder-decoder's count is of one of its two stacks: it must not choose between them.
    two_stacks = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    expected = None if two_stacks else _text_config(base).get("num_hidden_layers")
    fitting: dict[str, list[Block]] = {}
    for path, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if path != names.blocks and (names.blocks or expected not in (None, len(module))):
            continue
        described = [_describe(path, index, block, names) for index, block in enumerate(module)]
        if all(described):
            fitting[path] = [block for block in described if block is not None]
    if len(fitting) == 1 and (names.blocks or not two_stacks):
        return fitting.popitem()[1]
    if fitting:
        raise ValueError(
            f"model {type(base).__name__} must have one stack of blocks, or say which is to be "
            f"adapted, got {', '.join(fitting)}{' of an encoder-decoder' if two_stacks else ''}: "
            "set model.floe_block_names = floe.decoder_blocks.BlockNames(blocks=...)"
        )
    raise ValueError(
        f"model {type(base).__name__} has no decoder blocks floe knows: looked for a list of "
        f"{expected or 'equal'} blocks{f' at {names.blocks}' if names.blocks else ''} holding one "
        f"of {names.attention_output} and one of "
        f"{names.mlp_output} with their inputs {names.attention_inputs} and {names.mlp_inputs}; "
        "set model.floe_block_names = floe.decoder_blocks.BlockNames(...) to name them by hand"
    )


def geometry(model: nn.Module, blocks: list[Block] | None = None) -> Geometry:
    """Mask sizes of the model, checked against the shapes of the projections themselves.

    Raises:
        ValueError: when blocks differ in size, or the head count does not divide o_proj's width.
    """
    base = base_of(model)
    blocks = blocks or find_blocks(base)
    config = _text_config(base)
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"model.config must give num_attention_heads >= 1, got {heads!r}")
    widths = {
        (linear_at(base, b.o_proj).in_features, linear_at(base, b.down_proj).in_features)
        for b in blocks
    }
    if len(widths) != 1:
        raise ValueError(
            f"all blocks must have one size, got (attention, FFN) widths {sorted(widths)}"
        )
    attention, neurons = widths.pop()
    if attention % heads:
        raise ValueError(f"o_proj's width must be a multiple of {heads} heads, got {attention}")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    hidden = linear_at(base, blocks[0].down_proj).out_features
    return Geometry(len(blocks), heads, kv_heads, attention // heads, neurons, hidden)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The projection at ``path``, seen through an adapter's wrapper when one is attached."""
    module = base_of(model).get_submodule(path)
    return cast(nn.Linear, getattr(module, "base_layer", module))


def _describe(path: str, index: int, block: nn.Module, names: BlockNames) -> Block | None:
    def first(options: tuple[str, ...]) -> str | None:
        return next((o for o in options if _has(block, o)), None)

    def first_group(options: tuple[dict[str, str], ...]) -> dict[str, str] | None:
        return next((o for o in options if all(_has(block, name) for name in o.values())), None)

    output, attention = first(names.attention_output), first_group(names.attention_inputs)
    down, mlp = first(names.mlp_output), first_group(names.mlp_inputs)
    if output is None or attention is None or down is None or mlp is None:
        return None
    prefix = f"{path}.{index}"
    return Block(
        index=index,
        path=prefix,
        module=block,
        o_proj=f"{prefix}.{output}",
        down_proj=f"{prefix}.{down}",
        attention={key: f"{prefix}.{name}" for key, name in attention.items()},
        mlp={key: f"{prefix}.{name}" for key, name in mlp.items()},
    )


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return False
        module = child
    return True


def _text_config(model: nn.Module) -> dict[str, Any]:
    """The language model's configuration as a dict; empty for a module without one."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    get_text = getattr(config, "get_text_config", None)
    text = get_text(decoder=True) if callable(get_text) else config
    return {name: getattr(text, name, None) for name in _SIZES}


_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
