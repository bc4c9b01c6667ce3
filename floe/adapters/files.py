"""Adapter folders: saved whole, loaded strictly.

Loading runs no code, reads only the named folder, changes no base weight, and either yields exactly
the saved adapter or raises. (Loaders of transformers itself check the format's version only.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from floe.adapters.config import FloeConfig
from floe.adapters.peft_tuner import check_adapter_name, check_tensors
from floe.adapters.targets import adapter_shapes
from floe.atomic import replace_folder
from floe.errors import FileError

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LONGEST_CONFIG = 10 << 20


def save_adapter(
    model: peft.PeftModel, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    The folder appears complete or not at all.

    Raises:
        ValueError: if the model has no such floe adapter, or it holds NaN or infinity.
        FileError: if ``path`` exists and is not an adapter folder.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, FloeConfig):
        raise ValueError(
            f"model must hold a floe adapter named {adapter_name!r}, got {type(config).__name__}"
        )
    for name, parameter in model.named_parameters():
        if name.endswith(f".{adapter_name}") and not parameter.isfinite().all():
            raise ValueError(f"{name} must hold finite values to be saved, got NaN or infinity")
    target = Path(path)
    if target.exists() and not (target / _CONFIG).is_file():
        raise FileError(target, "exists and is not an adapter folder; not overwritten")
    beside = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(
            str(beside),
            selected_adapters=[adapter_name],
            safe_serialization=True,
            save_embedding_layers=False,  # "auto" would ask the hub for the base model's vocabulary
        )
        source = beside if adapter_name == "default" else beside / adapter_name
        _check_card(source)
        _seal(source)
        replace_folder(source, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> peft.PeftModel:
    """``base_model`` with the adapter in ``path``, exactly as saved.

    Raises:
        FileError: missing or damaged files, another method's adapter, a newer format, tensors that
            are missing, foreign, misshapen or not finite, or layers the base model does not have.
    """
    check_adapter_name(adapter_name)
    folder = Path(path)
    config = read_config(folder)
    _check_tensors(base_model, config, folder)  # before anything is wrapped
    try:
        return peft.PeftModel.from_pretrained(
            base_model,
            str(folder),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=False,
            use_safetensors=True,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise FileError(folder, f"cannot be loaded as a floe adapter: {error}") from error


def read_config(folder: Path) -> FloeConfig:
    """The adapter's configuration, checked; no model needed."""
    file = folder / _CONFIG
    if not file.is_file():
        raise FileError(file, "does not exist")
    if file.stat().st_size > _LONGEST_CONFIG:
        raise FileError(file, f"must be at most {_LONGEST_CONFIG} bytes, got {file.stat().st_size}")
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(file, f"cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("peft_type") != "FLOE":
        kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise FileError(file, f"peft_type must be FLOE, got {kind!r}")
    known = FloeConfig.__dataclass_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise FileError(file, f"unknown settings {unknown}: written by a newer floe or edited")
    try:
        config = FloeConfig(**{name: values[name] for name in values if name != "peft_type"})
    except (ValueError, TypeError) as error:
        raise FileError(file, str(error)) from error
    return config


def _check_tensors(base_model: nn.Module, config: FloeConfig, folder: Path) -> None:
    """Exactly the tensors ``config`` means on this model; FileError otherwise.

    Where floe saved them, also exactly the bytes it saved.
    """
    file = folder / _TENSORS
    if not file.is_file():
        raise FileError(file, "does not exist (other file formats are not loaded)")
    try:
        tensors = load_file(str(file))
        header, data = _split(file.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FileError(file, f"is damaged: {error}") from error
    digest = header.pop("__metadata__", {}).get("floe_digest")
    if digest is not None and digest != _digest(folder, header, data):
        raise FileError(
            file, f"is not what was saved, or {_CONFIG} beside it was edited: the digest differs"
        )
    try:
        shapes = adapter_shapes(base_model, config)
        check_tensors({n.removeprefix("base_model.model."): t for n, t in tensors.items()}, shapes)
    except (ValueError, TypeError) as error:
        raise FileError(folder, f"cannot be loaded as a floe adapter: {error}") from error


def _seal(folder: Path) -> None:
    """Put a digest of settings and tensors into the tensors' header.

    The header is sorted, so that equal adapters are equal bytes.
    """
    file = folder / _TENSORS
    header, data = _split(file.read_bytes())
    header.pop("__metadata__", None)
    header["__metadata__"] = {"floe_digest": _digest(folder, header, data), "format": "pt"}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data stays aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def _digest(folder: Path, header: dict[str, Any], data: bytes) -> str:
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    digest.update(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _check_card(folder: Path) -> None:
    """Say in the card what a stranger needs first: PEFT knows the method after ``import floe``."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    note = (
        "\n## Loading\n\n```python\n"
        "import floe.adapters  # registers the method with PEFT\nimport peft\n\n"
        "model = peft.PeftModel.from_pretrained(base_model, path)\n```\n"
    )
    if "import floe" not in text:
        card.write_text(text + note, encoding="utf-8")
