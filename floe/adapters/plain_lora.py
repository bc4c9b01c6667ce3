"""A routed adapter as one ordinary LoRA, for servers that know no router.

An approximation, with its error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from floe.adapters.config import FloeConfig
from floe.adapters.folder import PREFIX, TENSORS, check_new
from floe.adapters.linear import MoELoRALinear
from floe.adapters.targets import adapted_modules
from floe.data.loss import evaluating, token_mask
from floe.ops import moe_lora_add
from floe.storage import publish, staging
from floe.types import Batch


@dataclass(frozen=True)
class ExportReport:
    """How far the plain LoRA at ``path`` is off.

    ``module_error`` is the relative error of each module's adapter output,
    ``|lora - routed| / |routed|`` over the batches' tokens.
    """

    path: Path
    module_error: dict[str, float]

    @property
    def worst(self) -> float:
        """Largest of the modules' errors."""
        return max(self.module_error.values())


def export_lora(
    model: peft.PeftModel,
    path: str | os.PathLike[str],
    batches: Iterable[Batch],
    adapter_name: str = "default",
) -> ExportReport:
    """Write the plain LoRA whose experts are mixed by their mean gate, and say how far off it is.

    The mean is over the tokens of ``batches``. Exact where a router is constant; elsewhere the
    token-dependent mixture is lost and the error tells how much that is. A is shared by the
    experts, so the mixture ``sum_i mean(gate_i) B_i A`` is one LoRA of the same rank.

    Args:
        model: with a floe adapter.
        path: new or empty folder, readable by stock PEFT.
        batches: representative model inputs (``attention_mask`` marks the tokens that count).

    Raises:
        ValueError: if the model has no such active adapter, one with modules that are saved whole,
            or the batches hold no token.
        FileError: if ``path`` is in use: this adapter's own folder, or anything else.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, FloeConfig):
        raise ValueError(
            f"model must hold a floe adapter named {adapter_name!r}, got {type(config).__name__}"
        )
    if adapter_name not in model.active_adapters:
        raise ValueError(
            f"adapter {adapter_name!r} must be active to be measured, got {model.active_adapters}"
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            "adapter must have no modules_to_save and no trainable_token_indices to be exported, "
            f"got {config.modules_to_save} and {config.trainable_token_indices}"
        )
    target = Path(path)
    check_new(target)
    modules = {p: m for p, m in adapted_modules(model).items() if adapter_name in m.floe_shrink}
    kept = list(batches)
    gates = _mean_gates(model, modules, kept, adapter_name)
    errors = _errors(model, modules, kept, adapter_name, gates)
    _save(modules, config, gates, adapter_name, target)
    return ExportReport(target, errors)


def _mean_gates(
    model: nn.Module, modules: dict[str, MoELoRALinear], batches: list[Batch], name: str
) -> dict[str, Tensor]:
    sums = {p: torch.zeros(m.num_experts[name], dtype=torch.float64) for p, m in modules.items()}
    tokens = dict.fromkeys(modules, 0)

    def observe(path: str, layer: MoELoRALinear, x: Tensor) -> None:
        gate = torch.softmax(x.float() @ layer.router_weight(name).float().T, -1)
        sums[path] += gate.sum(0).double().cpu()
        tokens[path] += len(x)

    _visit(model, modules, batches, observe)
    if not all(tokens.values()):
        raise ValueError("batches must hold at least one token, got none")
    return {path: sums[path] / tokens[path] for path in modules}


def _errors(
    model: nn.Module,
    modules: dict[str, MoELoRALinear],
    batches: list[Batch],
    name: str,
    gates: dict[str, Tensor],
) -> dict[str, float]:
    wrong, right = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def observe(path: str, layer: MoELoRALinear, x: Tensor) -> None:
        shrink, expand = (weight.float() for weight in layer.adapter(name))
        zero = torch.zeros(len(x), layer.out_features, device=x.device)
        routed = moe_lora_add(zero, x.float(), shrink, expand, scaling=layer.scaling[name])
        a, b = _plain(layer, name, gates[path])
        plain = x.float() @ a.T @ b.T * layer.scaling[name]
        wrong[path] += float((plain - routed).double().square().sum())
        right[path] += float(routed.double().square().sum())

    _visit(model, modules, batches, observe)
    return {p: (wrong[p] / right[p]) ** 0.5 if right[p] > 0 else 0.0 for p in modules}


def _visit(
    model: nn.Module, modules: dict[str, MoELoRALinear], batches: list[Batch], observe: Any
) -> None:
    """Call ``observe(path, layer, x [tokens, K])`` for every adapted layer and every batch.

    Only the real tokens, those under ``attention_mask``, are shown.
    """
    keep: list[Tensor] = []

    def hook_for(path: str) -> Any:
        def hook(layer: MoELoRALinear, args: tuple[Tensor, ...]) -> None:
            observe(path, layer, args[0][keep[0]])

        return hook

    with ExitStack() as hooks, evaluating(model):
        for path, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(hook_for(path)).remove)
        for batch in batches:
            keep[:] = [token_mask(batch)]
            model(**{k: v for k, v in batch.items() if k != "labels"})


def _plain(layer: MoELoRALinear, name: str, gate: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and the experts' mixture B [N, r], float32."""
    shrink, expand = (weight.detach().float() for weight in layer.adapter(name))
    return shrink[: layer.r[name]], torch.einsum("nmr,m->nr", expand, gate.to(expand))


def _save(
    modules: dict[str, MoELoRALinear],
    config: FloeConfig,
    gates: dict[str, Tensor],
    name: str,
    path: Path,
) -> None:
    tensors: dict[str, Tensor] = {}
    for place, layer in modules.items():
        a, b = _plain(layer, name, gates[place])
        tensors[f"{PREFIX}{place}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{PREFIX}{place}.lora_B.weight"] = b.contiguous().cpu()
    ranks = {place: layer.r[name] for place, layer in modules.items()}
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=sorted(modules),
        rank_pattern={p: r for p, r in ranks.items() if r != config.r},
        use_rslora=config.scaling == "alpha/sqrt(r)",
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    lora.inference_mode = True
    with staging(path) as beside:
        lora.save_pretrained(str(beside))
        save_file(tensors, str(beside / TENSORS), metadata={"format": "pt"})
        publish(beside, path)
