"""Adapters that HydraLoRA's own code saved, as floe adapters.

There a layer is ``lora_A`` [r, K], experts ``lora_B0`` ... [N, r] and a router ``lora_route``
[M, K]; its output is the base's plus ``lora_alpha / r * sum_i softmax(route(x))_i B_i A x``, which
is what ours computes (github.com/Clin0212/HydraLoRA, read at commit afb693b). Its dropout draws a
mask for each expert; trained on here, an imported adapter draws one for all.
"""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from floe.adapters.config import DTYPES, FloeConfig
from floe.adapters.files import save_adapter
from floe.adapters.peft_tuner import get_model, remove_adapters
from floe.adapters.targets import adapted_modules
from floe.blocks import find_blocks
from floe.errors import FileError
from floe.runs import read_json

_CONFIG, _TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B(\d+)|route)(?:\.default)?\.weight")


def import_hydralora(
    source: str | os.PathLike[str], output: str | os.PathLike[str], base: nn.Module
) -> FloeConfig:
    """Write the HydraLoRA adapter in ``source`` as a floe adapter folder; returns its settings.

    Values are taken over as they are.

    Args:
        source: folder of adapter_config.json and adapter_model.safetensors or .bin.
        output: new folder.
        base: the base model. Its names and shapes alone are looked at: one on the meta device will
            do. It is left as it was.

    Raises:
        FileError: ``source`` holds no adapter of HydraLoRA's layout (names the tensor or setting),
            or one that does not fit the model, or ``output`` is in use.
    """
    folder = Path(source)
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
        raise FileError(Path(source) / _CONFIG, "names no base model: give one")
    return name


@dataclass
class _Layer:
    """One adapted projection of the source."""

    a: Tensor | None
    experts: dict[int, Tensor]
    route: Tensor | None

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """A [r, K], the router [M, K] and the experts [N, M, r].

        Raises:
            ValueError: one is missing, or their shapes differ.
        """
        count = len(self.experts)
        if self.a is None or self.route is None or not count:
            has = [n for n, v in (("lora_A", self.a), ("lora_route", self.route)) if v is not None]
            raise ValueError(
                "must have lora_A, lora_B0 ... and lora_route, "
                f"got {[*has, *(f'lora_B{i}' for i in sorted(self.experts))]}"
            )
        if sorted(self.experts) != list(range(count)) or len(self.route) != count:
            raise ValueError(
                f"must have as many experts as lora_route has rows, {len(self.route)}, "
                f"got lora_B of {sorted(self.experts)}"
            )
        experts = torch.stack([self.experts[i] for i in range(count)], dim=1)
        return self.a, self.route, experts


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        came = values.get("peft_type")
        raise FileError(file, f"peft_type must be LORA, as HydraLoRA writes it, got {came!r}")
    for name, allowed in (("bias", ("none", None)), ("modules_to_save", (None, []))):
        if values.get(name) not in allowed:
            raise FileError(file, f"{name} must be {allowed[0]!r} to import, got {values[name]!r}")
    for name in ("r", "lora_alpha"):
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), (int, float)):
            raise FileError(file, f"{name} must be a number, got {values.get(name)!r}")
    return values


def _layers(folder: Path) -> dict[str, _Layer]:
    """Module path -> its tensors. Pickled files are read as tensors alone: no code runs."""
    found = [folder / name for name in _TENSORS if (folder / name).is_file()]
    if not found:
        raise FileError(folder, f"must hold {' or '.join(_TENSORS)}, got neither")
    try:
        if found[0].suffix == ".safetensors":
            tensors = load_file(str(found[0]))
        else:
            tensors = torch.load(found[0], map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise FileError(found[0], f"cannot be read as tensors: {error}") from error
    if not isinstance(tensors, dict):
        raise FileError(found[0], f"must hold named tensors, got {type(tensors).__name__}")
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(str(name))
        if match is None or not isinstance(tensor, Tensor):
            raise FileError(
                found[0], f"tensors must be lora_A, lora_B<i> or lora_route, got {name}"
            )
        path, part, expert = match.groups()
        layer = layers.setdefault(path, _Layer(None, {}, None))
        if part == "A":
            layer.a = tensor
        elif part == "route":
            layer.route = tensor
        else:
            layer.experts[int(expert)] = tensor
    if not layers:
        raise FileError(found[0], "must hold at least one adapted layer, got none")
    return layers


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
    first, layer = next(iter(layers.items()))
    dtypes = {v: k for k, v in DTYPES.items()}
    try:
        a, route, _ = layer.parts()
        if len(a) != settings["r"]:  # r scales the output, too
            raise ValueError(f"lora_A must have r = {settings['r']} rows, got {len(a)}")
        return FloeConfig(
            r=len(a), num_experts=len(route), alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0), layer_modules=modules,
            adapter_dtype=dtypes.get(a.dtype, "float32"),
            base_model_name_or_path=settings.get("base_model_name_or_path"),
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        raise FileError(folder, f"{first}: {error}") from error


def _fill(module: Any, layer: _Layer, folder: Path, path: str) -> None:
    """Put the source's values into the fresh adapter of ``module``."""
    try:
        a, route, experts = layer.parts()
        values = {"floe_shrink": torch.cat([a, route]), "floe_expand": experts}
    except (ValueError, RuntimeError) as error:
        raise FileError(folder, f"{path}: {error}") from error
    for name, value in values.items():
        leaf = getattr(module, name)["default"]
        old = leaf.weight
        if value.shape != old.shape:
            raise FileError(
                folder, f"{path}: {name} must be of shape {tuple(old.shape)}, "
                f"as its rank, experts and the base layer say, got {tuple(value.shape)}",
            )  # fmt: skip
        leaf.weight = nn.Parameter(value.to(old.dtype).contiguous())
