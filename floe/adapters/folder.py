"""A saved adapter's folder: settings and tensors, sealed together by a digest, read strictly.

The digest finds damage, edits and halves of two adapters; it is no signature.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from floe.adapters.linear import MoELoRALinear
from floe.decoder_blocks import base_of
from floe.errors import FileError
from floe.storage import STAGING, unique_keys, write_bytes

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # what PEFT puts before the names of a file's tensors
_LONGEST_CONFIG = 10 << 20
_DIGEST = "floe_digest"
_UNSEALED_FORMAT = 1  # the only one in which another program's folder may lack the digest


def read_settings(folder: Path, method: str = "FLOE") -> tuple[dict[str, Any], bytes]:
    """Settings of the adapter in ``folder``, and the bytes they were read from.

    Raises:
        FileError: they are missing, no JSON object with each name once, or of another method.
    """
    raw = read_bytes(folder, CONFIG, _LONGEST_CONFIG)
    try:
        values: Any = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FileError(folder / CONFIG, f"cannot be read as JSON: {error}") from error
    kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
    if kind != method or not isinstance(values, dict):
        raise FileError(folder / CONFIG, f"peft_type must be {method}, got {kind!r}")
    return values, raw


def read_tensors(folder: Path, settings: dict[str, Any], config: bytes) -> dict[str, Tensor]:
    """The tensors that were saved with ``settings``, the content of ``config``.

    Raises:
        FileError: they are missing or damaged, or were not saved together.
    """
    file, raw = folder / TENSORS, read_bytes(folder, TENSORS)
    try:
        header, data = _split(raw)
        tensors: dict[str, Tensor] = load(raw)
        digest = header.pop("__metadata__", {}).get(_DIGEST)
    except (SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(file, f"is damaged: {error}") from error
    if digest is None and settings.get("floe_format") != _UNSEALED_FORMAT:
        raise FileError(file, "is not what was saved: it has no digest, the last thing written")
    if digest not in (None, _digest(config, header, data)):
        raise FileError(
            file, f"is not what was saved, or {CONFIG} beside it was edited: the digest differs"
        )
    return tensors


def current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file under the names of today's format, without PEFT's prefix.

    Raises:
        ValueError: two names are one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = re.sub(r"\.floe_(shrink|expand)$", r".floe_\1.weight", name.removeprefix(PREFIX))
        if renamed.setdefault(new, tensor) is not tensor:
            raise ValueError(f"an adapter file must name a tensor once, got {new} twice")
    return renamed


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Exactly the expected names and shapes, and finite floating-point values.

    Raises:
        ValueError: naming the first that is not.
    """
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"an adapter file must hold exactly this adapter's tensors, got {len(missing)} missing "
            f"(first: {missing[:1]}) and {len(extra)} that are none of its own (first: {extra[:1]})"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device.type != "meta" and not tensor.isfinite().all():
            raise ValueError(f"{name} must hold finite values, got NaN or infinity")


def holds_adapter(folder: Path) -> bool:
    """Whether floe is to read the folder: its settings or its tensors say so."""
    try:
        read_settings(folder)
    except FileError:
        try:
            header, _ = _split(read_bytes(folder, TENSORS))
            return _DIGEST in header["__metadata__"]
        except (FileError, ValueError, KeyError, TypeError, RecursionError):
            return False
    return True


def seal(folder: Path) -> None:
    """Put a digest of settings and tensors into the header of tensors that have none yet.

    The header is sorted, so that equal adapters are equal bytes.

    Raises:
        ValueError: the tensors were written as a pickle, which is never read.
    """
    file = folder / TENSORS
    header, data = _split(file.read_bytes()) if file.is_file() else ({}, b"")
    if not header or _DIGEST in header.get("__metadata__", {}):  # nothing new to seal
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"safe_serialization must be True for a floe adapter: {folder / PICKLE} "
                "would not be loaded"
            )
        return
    header.pop("__metadata__", None)
    digest = _digest((folder / CONFIG).read_bytes(), header, data)
    header["__metadata__"] = {_DIGEST: digest, "format": "pt"}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data stays aligned
    write_bytes(file, len(text).to_bytes(8, "little") + text + data)


def check_adapter_name(name: str) -> None:
    """Names become folders and parameter names, so no path and no dot; ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"adapter_name must hold only letters, digits, '_' and '-', got {name!r}")


def check_new(folder: Path) -> None:
    """FileError if anything would be replaced or mixed there."""
    if _entries(folder):
        raise FileError(folder, "exists and is not empty; not overwritten")


def check_replaceable(folder: Path) -> None:
    """FileError if the folder holds anything but, among other files, an adapter of floe's."""
    if _entries(folder):
        if not os.path.lexists(folder / CONFIG):
            raise FileError(folder, "exists and is not an adapter folder; not overwritten")
        try:
            read_settings(folder)
        except FileError as error:
            raise FileError(folder, f"holds no floe adapter; not overwritten ({error})") from error


def local(
    model_id: str | os.PathLike[str], names: tuple[str, ...], subfolder: str | None, **options: Any
) -> Path:
    """The folder of that name, or of the hub's cache once the hub's files ``names`` are there.

    ``options`` are PEFT's; those for the download are used.
    """
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        return folder
    known = inspect.signature(hf_hub_download).parameters
    options = {name: value for name, value in options.items() if name in known and value}
    for name in names:
        try:
            file = hf_hub_download(str(model_id), name, subfolder=subfolder, **options)
        except (OSError, ValueError) as error:
            raise FileError(model_id, f"has no {name}, here or on the hub: {error}") from error
    return Path(file).parent


def read_bytes(folder: Path, name: str, longest: int | None = None) -> bytes:
    """Content of a file that lies in ``folder``, or in the hub's cache that ``folder`` is part of.

    Raises:
        FileError: it does not, is missing, or longer than ``longest`` bytes.
    """
    file = folder / name
    try:
        if not file.is_file():
            other = " (other file formats are not loaded)" if name == TENSORS else ""
            raise FileError(file, f"does not exist{other}")
        home, real = folder.resolve(), file.resolve()
        if real.parent != home and not _is_cached(home, real):
            raise FileError(file, f"must lie in its folder, got a link to {real}")
        with real.open("rb") as opened:
            content = opened.read(-1 if longest is None else longest + 1)
    except (OSError, MemoryError, RuntimeError) as error:
        raise FileError(file, f"cannot be read: {error}") from error
    if longest is not None and len(content) > longest:
        raise FileError(file, f"must be at most {longest} bytes, got more")
    return content


def _is_cached(home: Path, real: Path) -> bool:
    """Whether ``home`` is a snapshot in the hub's cache, whose files are links to its blobs."""
    for folder in home.parents:
        repository = folder.parent
        if folder.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs"
            return real.parent == repository / "blobs" or real.parent.parent == shared
    return False


def _entries(folder: Path) -> list[str]:
    """What lies in a folder to be written to, other than floe's unfinished writing."""
    if folder.is_dir():
        return [name for name in os.listdir(folder) if not name.startswith(STAGING)]
    if os.path.lexists(folder):
        raise FileError(folder, "must be a folder, got something else; not overwritten")
    return []


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end], object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError(f"the header must be an object, got {type(header).__name__}")
    return header, raw[end:]


def _digest(config: bytes, header: dict[str, Any], data: bytes) -> str:
    digest = hashlib.sha256(config)
    digest.update(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Name in the model's state -> whole shape of every tensor of the adapter."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, MoELoRALinear) and adapter_name in module.settings:
            path = path.replace("_fsdp_wrapped_module.", "")
            for name, shape in module.settings[adapter_name].shapes(module.base_layer).items():
                shapes[f"{path}.{name}.{adapter_name}.weight"] = shape
    return shapes


def with_adapter_name(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors of modules that are saved whole under their names in the model."""
    renamed = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, here in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{path}.{saved}" in renamed:
                    renamed[f"{path}.{here}"] = renamed.pop(f"{path}.{saved}")
    return renamed


def saved_whole(model: nn.Module) -> set[str]:
    """Names in the model's state that a file may hold beside the adapter."""
    base: Any = base_of(model)
    resized = embeddings_resized(model)
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()] if resized else []
    paths = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or any(module is e for e in embeddings)
    )
    return {name for name in model.state_dict() if paths and name.startswith(paths)}


def embeddings_resized(model: nn.Module) -> bool:
    """Whether the vocabulary differs from that of the checkpoint the base was loaded from.

    Asks files of this machine alone; False where the checkpoint is not among them.
    """
    base: Any = base_of(model)
    config: Any = getattr(base, "config", None)
    path = getattr(base, "name_or_path", "")
    if not path or not hasattr(config, "get_text_config"):
        return False
    try:
        before = type(config).from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return bool(before.get_text_config().vocab_size != config.get_text_config().vocab_size)
