"""Adapters in other layouts: HydraLoRA's as floe's, and floe's as one ordinary LoRA.

In what HydraLoRA's own code saved, a layer is ``lora_A`` [r, K], experts ``lora_B0`` ... [N, r] and
a router ``lora_route`` [M, K]; its output is the base's plus ``lora_alpha / r * sum_i
softmax(route(x))_i B_i A x``, which is what ours computes (github.com/Clin0212/HydraLoRA, read at
commit afb693b). Its dropout draws a mask for each expert; trained on here, an imported adapter
draws one for all.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

from floe.adapters.config import DTYPES, FloeConfig
from floe.adapters.files import floe_config, save_adapter
from floe.adapters.folder import (
    CONFIG,
    PICKLE,
    PREFIX,
    TENSORS,
    check_new,
    read_bytes,
    read_settings,
)
from floe.adapters.linear import MoELoRALinear
from floe.adapters.targets import adapted_modules, remove_adapters
from floe.adapters.tuner import get_model
from floe.data.loss import evaluating, token_mask
from floe.decoder_blocks import find_blocks
from floe.errors import FileError
from floe.ops import moe_lora_add
from floe.storage import publish, staging
from floe.types import Batch

_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(A|B(?:0|[1-9][0-9]{0,3})|route)(?:\.default)?\.weight"
)
# Settings of LoRA's that make an adapter compute something else.
_ELSEWHERE = ["use_rslora", "use_dora", "fan_in_fan_out", "enable_lora"]
_ELSEWHERE += ["rank_pattern", "alpha_pattern"]


def import_hydralora(
    source: str | os.PathLike[str], output: str | os.PathLike[str], base: nn.Module
) -> FloeConfig:
    """Write the HydraLoRA adapter in ``source`` as a floe adapter folder; returns its settings.

    Values are taken over as they are.

    Args:
        source: folder of adapter_config.json and adapter_model.safetensors or .bin.
        output: new or empty folder.
        base: the base model. Its names and shapes alone are looked at: one on the meta device will
            do. It is left as it was.

    Raises:
        FileError: ``source`` holds no adapter of HydraLoRA's layout (names the tensor or setting),
            or one that does not fit the model, or ``output`` is in use.
    """
    folder = Path(source)
    check_new(Path(output))
    settings = _settings(folder)
    layers = _layers(folder)
    config = _config(folder, settings, layers, base)
    try:
        model = get_model(base, config)
    except (ValueError, TypeError) as error:
        raise FileError(folder, f"does not fit the base model: {error}") from error
    try:
        for path, module in adapted_modules(model).items():
            _fill(module, layers[path], folder, path)
        save_adapter(model, output)
    except (ValueError, TypeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(folder, str(error)) from error
    finally:
        remove_adapters(model)
    return config


def named_base(source: str | os.PathLike[str]) -> str:
    """The base model that the HydraLoRA adapter in ``source`` names.

    Raises:
        FileError: it names none.
    """
    name = _settings(Path(source)).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise FileError(Path(source) / CONFIG, "names no base model: give one")
    return name


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    values, _ = read_settings(folder, "LORA")  # as HydraLoRA calls itself
    for name, allowed in (("bias", ("none", None)), ("modules_to_save", (None, []))):
        if values.get(name) not in allowed:
            raise FileError(file, f"{name} must be {allowed[0]!r} to import, got {values[name]!r}")
    for name in _ELSEWHERE:
        if values.get(name):
            raise FileError(file, f"{name} must not be set to import, got {values[name]!r}")
    for name in ("r", "lora_alpha", "lora_dropout"):
        value = values.get(name)
        if name == "lora_dropout" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileError(file, f"{name} must be a number, got {value!r}")
    return values


_Layer = dict[str, Tensor]  # one adapted projection of the source: "A", "route", "B0", "B1", ...


def _layers(folder: Path) -> dict[str, _Layer]:
    """Module path -> its tensors. Pickled files are read as tensors alone: no code runs."""
    names = [name for name in (TENSORS, PICKLE) if (folder / name).is_file()]
    if not names:
        raise FileError(folder, f"must hold {TENSORS} or {PICKLE}, got neither")
    file, raw = folder / names[0], read_bytes(folder, names[0])
    try:
        if names[0] == TENSORS:
            tensors = safetensors.torch.load(raw)
        else:
            tensors = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes of torch's reader
        raise FileError(file, f"cannot be read as tensors: {error}") from error
    if not isinstance(tensors, dict):
        raise FileError(file, f"must hold named tensors, got {type(tensors).__name__}")
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name) if isinstance(name, str) else None
        if match is None or not isinstance(tensor, Tensor):
            raise FileError(file, f"tensors must be lora_A, lora_B<i> or lora_route, got {name}")
        _check_dense(tensor, file, name)
        path, part = match.groups()
        if layers.setdefault(path, {}).setdefault(part, tensor) is not tensor:
            raise FileError(file, f"{path}.lora_{part} must be given once, got {name}, too")
    if not layers:
        raise FileError(file, "must hold at least one adapted layer, got none")
    return layers


def _check_dense(tensor: Tensor, file: Path, name: str) -> None:
    """FileError unless the tensor is a plain matrix of its own values, in a type of floe's."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in DTYPES.values() or tensor.dim() != 2:
        given = f"{tensor.layout} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise FileError(file, f"{name} must be a dense matrix of {sorted(DTYPES)}, got {given}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileError(file, f"{name} must hold all its values, got one that repeats them")


def _parts(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, K], the router [M, K] and the experts [N, M, r].

    Raises:
        ValueError: one is missing, or their numbers differ. RuntimeError: their shapes do.
    """
    numbers = sorted(int(part[1:]) for part in layer if part[0] == "B")
    if "A" not in layer or "route" not in layer or not numbers:
        has = [f"lora_{part}" for part in ("A", "route") if part in layer]
        has += [f"lora_B{i}" for i in numbers]
        raise ValueError(f"must have lora_A, lora_B0 ... and lora_route, got {has}")
    route = layer["route"]
    if numbers != list(range(len(numbers))) or len(route) != len(numbers):
        raise ValueError(
            f"must have as many experts as lora_route has rows, {len(route)}, "
            f"got lora_B of {numbers}"
        )
    return layer["A"], route, torch.stack([layer[f"B{i}"] for i in numbers], dim=1)


def _config(
    folder: Path, settings: dict[str, Any], layers: dict[str, _Layer], model: nn.Module
) -> FloeConfig:
    places = {
        path: (str(block.index), name)
        for block in find_blocks(model)
        for name, path in block.linears.items()
    }
    modules: dict[str, list[str]] = {}
    for path in layers:
        if path not in places:
            raise FileError(folder, f"adapts {path}, which is no projection of the base model")
        index, name = places[path]
        modules.setdefault(index, []).append(name)
    first = min(layers)
    dtypes = {tensor.dtype for each in layers.values() for tensor in each.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds them all
    try:
        a, route, _ = _parts(layers[first])
        if settings.get("lora_nums") not in (None, len(route)):
            raise ValueError(f"lora_nums must be {len(route)} experts, got {settings['lora_nums']}")
        if len(a) != settings["r"]:  # r scales the output, too
            raise ValueError(f"lora_A must have r = {settings['r']} rows, got {len(a)}")
        return FloeConfig(
            r=len(a),
            num_experts=len(route),
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0),
            layer_modules=modules,
            adapter_dtype=str(dtype).removeprefix("torch."),
            base_model_name_or_path=settings.get("base_model_name_or_path"),
        )
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise FileError(folder, f"{first}: {error}") from error


def _fill(module: Any, layer: _Layer, folder: Path, path: str) -> None:
    """Put the source's values into the fresh adapter of ``module``."""
    try:
        a, route, experts = _parts(layer)
        values = {"floe_shrink": torch.cat([a, route]), "floe_expand": experts}
    except (ValueError, RuntimeError) as error:
        raise FileError(folder, f"{path}: {error}") from error
    for name, value in values.items():
        leaf = getattr(module, name)["default"]
        old = leaf.weight
        if value.shape != old.shape:
            rule = f"{path}: {name} must be of shape {tuple(old.shape)}, as its rank, experts and "
            raise FileError(folder, f"{rule}the base layer say, got {tuple(value.shape)}")
        leaf.weight = nn.Parameter(value.to(old.dtype).contiguous())


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
    experts, so the mixture ``sum_i mean(gate_i) B_i A`` is one LoRA of the same rank; experts with
    an A of their own make one of rank M r.

    Args:
        model: with a floe adapter.
        path: new or empty folder, readable by stock PEFT.
        batches: representative model inputs (``attention_mask`` marks the tokens that count).

    Raises:
        ValueError: if the model has no such active adapter, one with modules that are saved whole,
            or the batches hold no token.
        FileError: if ``path`` is in use: this adapter's own folder, or anything else.
    """
    config = floe_config(model, adapter_name)
    if adapter_name not in model.active_adapters:
        raise ValueError(
            f"adapter {adapter_name!r} must be active to be measured, got {model.active_adapters}"
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            "adapter must have no modules_to_save and no trainable_token_indices to be exported, "
            f"got {config.modules_to_save} and {config.trainable_token_indices}"
        )
    target, kept = Path(path), list(batches)
    check_new(target)
    modules = {p: m for p, m in adapted_modules(model).items() if adapter_name in m.settings}
    plain = _plain(model, modules, kept, adapter_name)
    errors = _errors(model, modules, kept, adapter_name, plain)
    _save(plain, config, target, {p: m.settings[adapter_name].rank for p, m in modules.items()})
    return ExportReport(target, errors)


_Plain = dict[str, tuple[Tensor, Tensor]]  # path -> A [r, K] and B [N, r], float32


def _plain(
    model: nn.Module, modules: dict[str, MoELoRALinear], batches: list[Batch], name: str
) -> _Plain:
    sums: dict[str, Any] = dict.fromkeys(modules, 0.0)
    tokens = dict.fromkeys(modules, 0)

    def observe(path: str, layer: MoELoRALinear, x: Tensor) -> None:
        sums[path] += layer.gates(name, x).sum(0).double().cpu()
        tokens[path] += len(x)

    _visit(model, modules, batches, observe)
    if not all(tokens.values()):
        raise ValueError("batches must hold at least one token, got none")
    plain = {}
    for path, layer in modules.items():
        shrink, expand = (weight.detach().float() for weight in layer.adapter(name))
        gate, settings = (sums[path] / tokens[path]).to(expand), layer.settings[name]
        mixed = expand * gate[:, None]
        b = mixed.sum(1) if settings.shared_a else mixed.flatten(1)  # one A, or one below the other
        plain[path] = shrink[: settings.hidden_size], b
    return plain


def _errors(
    model: nn.Module,
    modules: dict[str, MoELoRALinear],
    batches: list[Batch],
    name: str,
    plain: _Plain,
) -> dict[str, float]:
    wrong, right = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def observe(path: str, layer: MoELoRALinear, x: Tensor) -> None:
        shrink, expand = (weight.float() for weight in layer.adapter(name))
        x, (a, b), scaling = x.float(), plain[path], layer.settings[name].scaling
        zero = torch.zeros(len(x), layer.out_features, device=x.device)
        settings = layer.call_settings(x, name)
        routed = moe_lora_add(zero, x, shrink, expand, **settings)
        wrong[path] += float((x @ a.T @ b.T * scaling - routed).double().square().sum())
        right[path] += float(routed.double().square().sum())

    _visit(model, modules, batches, observe)
    return {p: (wrong[p] / right[p]) ** 0.5 if right[p] > 0 else 0.0 for p in modules}


def _visit(
    model: nn.Module,
    modules: dict[str, MoELoRALinear],
    batches: list[Batch],
    observe: Callable[[str, MoELoRALinear, Tensor], None],
) -> None:
    """Call ``observe(path, layer, x [tokens, K])`` for every adapted layer and every batch.

    Only the real tokens, those under ``attention_mask``, are shown.
    """
    real: list[Tensor] = []

    def hook_for(path: str) -> Any:
        return lambda layer, args: observe(path, layer, args[0][real[0]])

    with ExitStack() as hooks, evaluating(model):
        for path, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(hook_for(path)).remove)
        for batch in batches:
            real[:] = [token_mask(batch)]
            model(**{k: v for k, v in batch.items() if k != "labels"})


def _save(plain: _Plain, config: FloeConfig, path: Path, rank_of: dict[str, int]) -> None:
    tensors = {
        f"{PREFIX}{place}.lora_{name}.weight": value.contiguous().cpu()
        for place, parts in plain.items()
        for name, value in zip("AB", parts, strict=True)
    }
    ranks = {place: len(a) for place, (a, _) in plain.items()}
    rooted = config.scaling == "alpha/sqrt(r)"
    times = {place: rank / rank_of[place] for place, rank in ranks.items()}  # M with an A for each
    alphas = {p: config.alpha * (t**0.5 if rooted else t) for p, t in times.items() if t != 1}
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=sorted(plain),
        rank_pattern={p: r for p, r in ranks.items() if r != config.r},
        alpha_pattern=alphas,  # the scaling is that of r, not of M r
        use_rslora=rooted,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    lora.inference_mode = True
    with staging(path) as beside:
        lora.save_pretrained(str(beside))
        safetensors.torch.save_file(tensors, str(beside / TENSORS), metadata={"format": "pt"})
        publish(beside, path)
