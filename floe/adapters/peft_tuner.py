"""floe as a PEFT method: ``FloeConfig`` is a ``PeftConfig``, so everything built on PEFT takes it.

``get_peft_model``, the Hugging Face ``Trainer``, ``save_pretrained`` and ``PeftModel.from_pretrained`` work as
for any method of PEFT's own, once this module has been imported in the process.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from floe.adapters.moe_lora import MoELoRALinear, module_generator
from floe.blocks import base_of, find_blocks

FORMAT = 1
DEFAULT_TARGETS = ("down_proj", "gate_proj", "up_proj")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _peft_type() -> Any:
    """PEFT's enum of methods is closed; transformers reads its members, so a plain string would not do."""
    if "FLOE" not in PeftType.__members__:
        member = str.__new__(PeftType, "FLOE")
        member._name_, member._value_ = "FLOE", "FLOE"
        PeftType._member_map_["FLOE"] = member
        PeftType._value2member_map_["FLOE"] = member
        PeftType._member_names_.append("FLOE")
    return PeftType["FLOE"]


@dataclass
class FloeConfig(peft.PeftConfig):
    """Which linears get routed low-rank experts, and how large.

    Args:
        r: rank, >= 1. num_experts: M >= 1. alpha: scaling is alpha / r.
        dropout: in [0, 1), in steps of 1/256, on the adapter's input; the router sees x undropped.
        target_modules: names of projections inside a decoder block, for example ``["gate_proj", "up_proj",
            "down_proj"]`` (the default, FLoE Table 6); fused ones (``gate_up_proj``) count under their own name.
        layers: 0-based indices of the blocks to adapt; None = all.
        rank_pattern, expert_pattern: per-layer overrides, ``{layer index: value}``; also by exact module path.
        scaling: "alpha/r" or "alpha/sqrt(r)".
        adapter_dtype: storage of the adapter, "float32" (default), "bfloat16" or "float16"; products run in the
            dtype of the activations either way.
        seed: of the initial values; a layer's depend on the seed and its path alone.

    Raises:
        ValueError: for a value out of range, or a file written by a newer format than this version reads.
    """

    r: int = 8
    num_experts: int = 4
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: list[str] | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    expert_pattern: dict[str, int] = field(default_factory=dict)
    scaling: str = "alpha/r"
    adapter_dtype: str = "float32"
    seed: int = 41
    floe_format: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        self.task_type = self.task_type or "CAUSAL_LM"
        if not isinstance(self.floe_format, int) or not 1 <= self.floe_format <= FORMAT:
            raise ValueError(
                f"floe_format must be in [1, {FORMAT}] for this version of floe, got {self.floe_format!r}: "
                "a larger one was written by a newer floe; upgrade to read it"
            )
        self._check_sizes()
        if self.target_modules is not None:
            names = self.target_modules
            if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) for n in names):
                raise ValueError(
                    "target_modules must be a list of projection names such as ['gate_proj', 'up_proj', "
                    f"'down_proj'] (patterns are not supported), got {names!r}"
                )
            self.target_modules = sorted(set(names))
        if self.layers is not None:
            self.layers = _checked_layers(self.layers)
        for name in ("rank_pattern", "expert_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict):
                raise TypeError(f"{name} must map layer indices or module paths to sizes, got {pattern!r}")
            setattr(self, name, {str(key): _size(name, value) for key, value in pattern.items()})

    def _check_sizes(self) -> None:
        _size("r", self.r)
        _size("num_experts", self.num_experts)
        if not isinstance(self.seed, int):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        for name in ("alpha", "dropout"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number > 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.scaling not in ("alpha/r", "alpha/sqrt(r)"):
            raise ValueError(f"scaling must be 'alpha/r' or 'alpha/sqrt(r)', got {self.scaling!r}")
        if self.adapter_dtype not in list(_DTYPES):
            raise ValueError(f"adapter_dtype must be one of {sorted(_DTYPES)}, got {self.adapter_dtype!r}")

    def scale(self, rank: int) -> float:
        """Factor of the adapter's output at this rank."""
        return float(self.alpha) / (rank if self.scaling == "alpha/r" else rank**0.5)


class FloeModel(BaseTuner):
    """PEFT's tuner of floe: wraps the chosen projections in :class:`MoELoRALinear`."""

    prefix = "floe_"
    tuner_layer_cls = MoELoRALinear
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Every way to add an adapter comes through here, so here its name, a folder's name later, is checked."""
        check_adapter_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: FloeConfig, model_config: dict[str, Any]) -> FloeConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(DEFAULT_TARGETS)
        return peft_config

    def _prepare_model(self, peft_config: FloeConfig, model: nn.Module) -> None:
        targets = target_paths(model, peft_config)
        for path in targets:  # all of them, before the first is wrapped
            _linear(model.get_submodule(path), path)
        # Not fields: they follow from the others, and PEFT writes fields to disk.
        peft_config._targets = targets  # type: ignore[attr-defined]
        peft_config.rank_pattern = _by_path("rank_pattern", peft_config.rank_pattern, targets)
        peft_config.expert_pattern = _by_path("expert_pattern", peft_config.expert_pattern, targets)

    @staticmethod
    def _check_target_module_exists(peft_config: FloeConfig, key: str) -> bool:
        return key in peft_config._targets  # type: ignore[attr-defined]

    def _create_and_replace(
        self,
        peft_config: FloeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        rank = peft_config.rank_pattern.get(current_key, peft_config.r)
        experts = peft_config.expert_pattern.get(current_key, peft_config.num_experts)
        layer = target if isinstance(target, MoELoRALinear) else MoELoRALinear(_linear(target, current_key))
        layer.update_layer(
            adapter_name, rank, experts, peft_config.scale(rank), float(peft_config.dropout),
            module_generator(peft_config.seed, current_key), _DTYPES[peft_config.adapter_dtype],
        )  # fmt: skip
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own remapping, then refuse what it would let pass: missing, foreign or damaged tensors."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        shapes = {
            name.removeprefix("base_model.model."): tuple(value.shape)
            for name, value in model.state_dict().items()
            if re.search(rf"\.floe_(shrink|expand)\.{re.escape(adapter_name)}$", name)
        }
        check_tensors({n.removeprefix("base_model.model."): t for n, t in remapped.items()}, shapes)
        return remapped


def check_adapter_name(name: str) -> None:
    """Names become folders and parameter names, so no path and no dot; ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"adapter_name must hold only letters, digits, '_' and '-', got {name!r}")


def check_tensors(found: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Exactly the expected names, shapes and finite floating-point values, else ValueError naming the first."""
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"an adapter file must hold exactly this adapter's tensors, got {len(missing)} missing "
            f"(first: {missing[:1]}) and {len(extra)} that are none of its own (first: {extra[:1]})"
        )
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device.type != "meta" and not tensor.isfinite().all():
            raise ValueError(f"{name} must hold finite values, got NaN or infinity")


def get_model(base_model: nn.Module, config: FloeConfig, seed: int | None = None) -> peft.PeftModel:
    """``base_model`` with fresh adapters, all other parameters frozen; B is zero, so outputs are unchanged.

    Args:
        base_model: a Hugging Face causal language model, changed in place (its projections are wrapped).
        config: which layers, rank, experts. seed: replaces ``config.seed`` when given.

    Raises:
        ValueError: for layers or modules the model does not have; the model is then as it was.
    """
    config = dataclasses.replace(config) if seed is None else dataclasses.replace(config, seed=seed)
    target_paths(base_model, config)
    return peft.get_peft_model(base_model, config, autocast_adapter_dtype=False)


def adapted_modules(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Path in the base model -> adapted layer, in the model's order."""
    base = base_of(model)
    return {path: m for path, m in base.named_modules() if isinstance(m, MoELoRALinear)}


def adapted_layers(model: nn.Module) -> dict[int, dict[str, MoELoRALinear]]:
    """Block index -> {projection name: adapted layer}, for the blocks that carry adapters."""
    modules = adapted_modules(model)
    layers = {
        block.index: {name: modules[path] for name, path in block.linears.items() if path in modules}
        for block in find_blocks(model)
    }
    return {index: found for index, found in layers.items() if found}


def parameter_counts(model: nn.Module, config: FloeConfig) -> list[int]:
    """Adapter parameters of each block if it were adapted: r K + M N r + M K summed over its targets.

    Needs only shapes: works for models on the meta device. ``config.layers`` is ignored.
    """
    base, targets = base_of(model), config.target_modules or list(DEFAULT_TARGETS)
    counts = []
    for block in find_blocks(base):
        shapes = [
            shape
            for path in _block_targets(block.linears, targets)
            for shape in _shapes(base, config, block.index, path)
        ]
        counts.append(sum(math.prod(shape) for shape in shapes))
    return counts


def adapter_shapes(model: nn.Module, config: FloeConfig) -> dict[str, tuple[int, ...]]:
    """Name (path in the base model, then the parameter's) -> shape of every tensor of ``config``'s adapter."""
    base = base_of(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, index in target_paths(base, config).items():
        shapes[f"{path}.floe_shrink"], shapes[f"{path}.floe_expand"] = _shapes(base, config, index, path)
    return shapes


def target_paths(model: nn.Module, config: FloeConfig) -> dict[str, int]:
    """Exact module path -> block index of every projection ``config`` adapts."""
    blocks = find_blocks(model)
    wanted = list(range(len(blocks))) if config.layers is None else config.layers
    beyond = [index for index in wanted if index >= len(blocks)]
    if beyond:
        raise ValueError(f"layers must be in [0, {len(blocks) - 1}] for this model, got {beyond}")
    targets = config.target_modules or list(DEFAULT_TARGETS)
    return {
        path: block.index
        for block in blocks
        if block.index in set(wanted)
        for path in _block_targets(block.linears, targets)
    }


def _block_targets(linears: dict[str, str], targets: list[str]) -> list[str]:
    unknown = sorted(set(targets) - linears.keys())
    if unknown:
        raise ValueError(
            f"target_modules must be among this model's projections {sorted(linears)}, got {unknown}"
        )
    return [path for name, path in linears.items() if name in targets]


def _shapes(
    base: nn.Module, config: FloeConfig, index: int, path: str
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Of ``floe_shrink`` [r + M, K] and ``floe_expand`` [N, M, r] at ``path``, in block ``index``."""
    linear = _linear(base.get_submodule(path), path)
    rank, experts = _pattern(config, "rank", index, path), _pattern(config, "expert", index, path)
    return (rank + experts, linear.in_features), (linear.out_features, experts, rank)


def _pattern(config: FloeConfig, kind: str, index: int, path: str) -> int:
    pattern: dict[str, int] = getattr(config, f"{kind}_pattern")
    default = config.r if kind == "rank" else config.num_experts
    return pattern.get(path, pattern.get(str(index), default))


def _by_path(name: str, pattern: dict[str, int], targets: dict[str, int]) -> dict[str, int]:
    """``{layer index or path: value}`` as ``{path: value}``, sorted; a key that adapts nothing is an error."""
    resolved: dict[str, int] = {}
    for key, value in pattern.items():
        paths = [p for p, index in targets.items() if key in (p, str(index))]
        if not paths:
            raise ValueError(f"{name} keys must be adapted layers or module paths, got {key!r}")
        resolved |= dict.fromkeys(paths, value)
    return dict(sorted(resolved.items()))


def _linear(module: nn.Module, path: str) -> Any:
    linear = module.get_base_layer() if isinstance(module, MoELoRALinear) else module
    if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
        raise ValueError(f"{path} must be a linear layer to be adapted, got {type(linear).__name__}")
    return linear


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value}")
    return value


def _checked_layers(layers: Any) -> list[int]:
    values = [layers] if isinstance(layers, int) else list(layers)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
            raise ValueError(f"layers must be block indices >= 0, got {value!r}")
    if not values:
        raise ValueError("layers must name at least one block, got an empty list")
    return sorted({int(value) for value in values})


_peft_type()
if "FLOE" not in {getattr(key, "value", key) for key in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}:
    register_peft_method(name="floe", config_cls=FloeConfig, model_cls=FloeModel, prefix="floe_")
