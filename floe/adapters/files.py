"""Adapter folders: saved whole, loaded strictly.

Loading runs no code, reads only the named folder, changes no base weight, and either yields exactly
the saved adapter or raises. (Loaders of transformers itself check the settings only.)
"""

from __future__ import annotations

import os
from pathlib import Path

import peft
from peft import set_peft_model_state_dict
from torch import nn

from floe.adapters.config import FloeConfig
from floe.adapters.folder import check_adapter_name, check_replaceable, embeddings_resized
from floe.adapters.targets import remove_adapters
from floe.adapters.tuner import loaded_config, take_off_unheld, wrap
from floe.errors import FileError
from floe.storage import CARD, publish, staging

_REFUSALS = (ValueError, TypeError, RuntimeError, OSError, KeyError)
# What a stranger needs first: PEFT knows the method after ``import floe``.
_LOADING = """
## Loading

```python
import floe  # registers the method with PEFT
import peft

model = peft.PeftModel.from_pretrained(base_model, path)
```
"""


def floe_config(model: peft.PeftModel, adapter_name: str) -> FloeConfig:
    """That of the model's floe adapter of this name; ValueError where it has none."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, FloeConfig):
        raise ValueError(
            f"model must hold a floe adapter named {adapter_name!r}, got {type(config).__name__}"
        )
    return config


def save_adapter(
    model: peft.PeftModel, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and, if there is none, a card.

    A new folder appears complete or not at all. In one that holds a floe adapter the two files are
    replaced and all others stay; a kill between the two leaves a folder that is not loaded.

    Raises:
        ValueError: if the model has no such floe adapter, or it holds NaN or infinity.
        FileError: if ``path`` holds anything but a floe adapter.
    """
    floe_config(model, adapter_name)
    target = Path(path)
    check_replaceable(target)
    with staging(target) as beside:
        model.save_pretrained(
            str(beside),
            selected_adapters=[adapter_name],
            safe_serialization=True,
            # "auto" would ask the hub for the base model's vocabulary
            save_embedding_layers=embeddings_resized(model),
        )
        source = beside if adapter_name == "default" else beside / adapter_name
        card = source / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "import floe" not in text:
            card.write_text(text + _LOADING, encoding="utf-8")
        publish(source, target)


def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    other_base: bool = False,
) -> peft.PeftModel:
    """``base_model`` with the adapter in ``path``, exactly as saved.

    With ``other_base`` its weights need not be those that the adapter was trained on.

    Raises:
        FileError: missing or damaged files, another method's adapter, a newer format, tensors that
            are missing, foreign, misshapen or not finite, layers the base model does not have, or
            another base model's adapter. The base model is then as it was.
    """
    check_adapter_name(adapter_name)
    take_off_unheld(base_model)
    folder = Path(path)
    config, tensors = loaded_config(folder)
    if other_base:
        config.base_fingerprint = None
    config.inference_mode = not is_trainable
    try:
        # not from_pretrained, which takes an offloaded base apart and cannot put it together again
        model = wrap(base_model, config, adapter_name)
        set_peft_model_state_dict(model, tensors, adapter_name)
        return model if is_trainable else model.eval()
    except BaseException as error:
        remove_adapters(base_model)
        if isinstance(error, FileError) or not isinstance(error, _REFUSALS):
            raise
        raise FileError(folder, f"cannot be loaded as a floe adapter: {error}") from error
