"""Adapters that HydraLoRA's own code saved, as floe adapters.

There a layer is ``lora_A`` [r, K], experts ``lora_B0`` ... [N, r] and a router ``lora_route``
[M, K]; its output is the base's plus ``lora_alpha / r * sum_i softmax(route(x))_i B_i A x``, which
is what ours computes (github.com/Clin0212/HydraLoRA, read at commit afb693b). Its dropout draws a
mask for each expert; trained on here, an imported adapter draws one for all.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from floe.adapters.config import DTYPES, FloeConfig
from floe.adapters.files import save_adapter
from floe.adapters.folder import CONFIG, PICKLE, TENSORS, check_new, read_bytes, read_settings
from floe.adapters.targets import adapted_modules, remove_adapters
from floe.adapters.tuner import get_model
from floe.decoder_blocks import find_blocks
from floe.errors import FileError

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
    """The base model that the adapter in ``source`` names.

    Raises:
        FileError: it names none.
    """
    name = _settings(Path(source)).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise FileError(Path(source) / CONFIG, "names no base model: give one")
    return name


_Layer = dict[str, Tensor]  # one adapted projection of the source: "A", "route", "B0", "B1", ...


def _parts(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, K], the router [M, K] and the experts [N, M, r].

    Raises:
        ValueError: one is missing, or their shapes differ.
    """
    numbers = sorted(int(part[1:]) for part in layer if part[0] == "B")
    if "A" not in layer or "route" not in layer or not numbers:
        has = [f"lora_{part}" for part in ("A", "route") if part in layer]
        raise ValueError(
            "must have lora_A, lora_B0 ... and lora_route, "
            f"got {[*has, *(f'lora_B{i}' for i in numbers)]}"
        )
    route = layer["route"]
    if numbers != list(range(len(numbers))) or len(route) != len(numbers):
        raise ValueError(
            f"must have as many experts as lora_route has rows, {len(route)}, "
            f"got lora_B of {numbers}"
        )
    return layer["A"], route, torch.stack([layer[f"B{i}"] for i in numbers], dim=1)


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
        if value is None and name == "lora_dropout":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileError(file, f"{name} must be a number, got {value!r}")
    return values


def _layers(folder: Path) -> dict[str, _Layer]:
    """Module path -> its tensors. Pickled files are read as tensors alone: no code runs."""
    files = [folder / name for name in (TENSORS, PICKLE) if (folder / name).is_file()]
    if not files:
        raise FileError(folder, f"must hold {TENSORS} or {PICKLE}, got neither")
    raw = read_bytes(folder, files[0].name)
    try:
        if files[0].name == TENSORS:
            tensors = safetensors.torch.load(raw)
        else:
            tensors = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes of torch's reader
        raise FileError(files[0], f"cannot be read as tensors: {error}") from error
    if not isinstance(tensors, dict):
        raise FileError(files[0], f"must hold named tensors, got {type(tensors).__name__}")
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name) if isinstance(name, str) else None
        if match is None or not isinstance(tensor, Tensor):
            raise FileError(
                files[0], f"tensors must be lora_A, lora_B<i> or lora_route, got {name}"
            )
        _check_dense(tensor, files[0], name)
        path, part = match.groups()
        if layers.setdefault(path, {}).setdefault(part, tensor) is not tensor:
            raise FileError(files[0], f"{path}.lora_{part} must be given once, got {name}, too")
    if not layers:
        raise FileError(files[0], "must hold at least one adapted layer, got none")
    return layers


def _check_dense(tensor: Tensor, file: Path, name: str) -> None:
    """FileError unless the tensor is a plain matrix of its own values, in a type of floe's."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in DTYPES.values() or tensor.dim() != 2:
        given = f"{tensor.layout} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise FileError(file, f"{name} must be a dense matrix of {sorted(DTYPES)}, got {given}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileError(file, f"{name} must hold all its values, got one that repeats them")


def _config(
    folder: Path, settings: dict[str, Any], layers: dict[str, _Layer], model: nn.Module
) -> FloeConfig:
    places = {
        path: (block.index, name)
        for block in find_blocks(model)
        for name, path in block.linears.items()
    }
    modules: dict[str, list[str]] = {}
    for path in layers:
        if path not in places:
            raise FileError(folder, f"adapts {path}, which is no projection of the base model")
        index, name = places[path]
        modules.setdefault(str(index), []).append(name)
    first = min(layers)
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {tensor.dtype for each in layers.values() for tensor in each.values()}
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
            adapter_dtype=names[dtypes.pop()] if len(dtypes) == 1 else "float32",  # holds them all
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
