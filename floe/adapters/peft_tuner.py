"""floe as a PEFT method: everything built on PEFT takes a ``FloeConfig``.

``get_peft_model``, the Hugging Face ``Trainer``, ``save_pretrained`` and
``PeftModel.from_pretrained`` work as for any method of PEFT's own, once this module has been
imported in the process.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from floe.adapters.config import DEFAULT_TARGETS, DTYPES, FloeConfig, peft_type
from floe.adapters.moe_lora import MoELoRALinear, module_generator
from floe.adapters.targets import by_path, linear_of, link_shared_inputs, target_paths


class FloeModel(BaseTuner):
    """PEFT's tuner of floe: wraps the chosen projections in :class:`MoELoRALinear`."""

    prefix = "floe_"
    tuner_layer_cls = MoELoRALinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check the adapter's name, later a folder's, then add the adapter.

        Every way to add one comes through here.
        """
        check_adapter_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        link_shared_inputs(model)

    def _prepare_adapter_config(
        self, peft_config: FloeConfig, model_config: dict[str, Any]
    ) -> FloeConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(DEFAULT_TARGETS)
        return peft_config

    def _prepare_model(self, peft_config: FloeConfig, model: nn.Module) -> None:
        targets = target_paths(model, peft_config)
        for path in targets:  # all of them, before the first is wrapped
            linear_of(model.get_submodule(path), path)
        # Not fields: they follow from the others, and PEFT writes fields to disk.
        peft_config._targets = targets  # type: ignore[attr-defined]
        peft_config.rank_pattern = by_path("rank_pattern", peft_config.rank_pattern, targets)
        peft_config.expert_pattern = by_path("expert_pattern", peft_config.expert_pattern, targets)

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
        layer = (
            target
            if isinstance(target, MoELoRALinear)
            else MoELoRALinear(linear_of(target, current_key))
        )
        layer.update_layer(
            adapter_name, rank, experts, peft_config.scale(rank), float(peft_config.dropout),
            module_generator(peft_config.seed, current_key), DTYPES[peft_config.adapter_dtype],
            peft_config.backend, peft_config.share_input,
        )  # fmt: skip
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own remapping, then refuse what it would let pass.

        That is missing, foreign or damaged tensors.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
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
    """Exactly the expected names and shapes, and finite floating-point values.

    Raises:
        ValueError: naming the first that is not.
    """
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
    """``base_model`` with fresh adapters, all other parameters frozen.

    B is zero, so outputs are unchanged.

    Args:
        base_model: a Hugging Face causal language model, changed in place (its projections are
            wrapped).
        config: which layers, rank, experts.
        seed: replaces ``config.seed`` when given.

    Raises:
        ValueError: for layers or modules the model does not have; the model is then as it was.
    """
    config = dataclasses.replace(config) if seed is None else dataclasses.replace(config, seed=seed)
    target_paths(base_model, config)
    return peft.get_peft_model(base_model, config, autocast_adapter_dtype=False)


def remove_adapters(model: Any) -> nn.Module:
    """Take every adapter off a PEFT model; the base model is as it was before, and is returned."""
    base: nn.Module = model.unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)
    return base


peft_type()
if "FLOE" not in {getattr(key, "value", key) for key in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}:
    register_peft_method(name="floe", config_cls=FloeConfig, model_cls=FloeModel, prefix="floe_")
