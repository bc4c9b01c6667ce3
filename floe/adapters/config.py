"""``FloeConfig``, a ``peft.PeftConfig``: which linears get routed experts, and how large."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import PeftType

from floe.adapters.folder import CONFIG, local, read_settings, seal
from floe.adapters.linear import AdapterSettings
from floe.errors import FileError, require
from floe.ops import BACKENDS, LEAST_TEMPERATURE

FORMAT = 2  # 1 named tensors without ".weight"; both are read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def peft_type() -> Any:
    """floe's member of PEFT's enum of methods, added to it where it is missing.

    The enum is closed, but transformers reads its members, so a plain string would not do.
    """
    if "FLOE" not in PeftType.__members__:
        member = str.__new__(PeftType, "FLOE")
        member._name_, member._value_ = "FLOE", "FLOE"
        PeftType._member_map_["FLOE"] = member
        PeftType._value2member_map_["FLOE"] = member
        PeftType._member_names_.append("FLOE")
        type.__setattr__(PeftType, "FLOE", member)  # from Python 3.12 on, members are attributes
    return PeftType["FLOE"]


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(n, str) for n in value)


# What a single setting must be, "must be ..." in an error.
_TYPES: dict[str, tuple[Any, str]] = {
    "seed": (int, "a whole number"),
    "alpha": ((int, float), "a number"),
    "dropout": ((int, float), "a number"),
    "share_input": (bool, "true or false"),
    "shared_a": (bool, "true or false"),
    "top_k": (int, "a whole number"),
    "temperature": ((int, float), "a number"),
}
_VALUES: dict[str, tuple[Callable[[Any], Any], str]] = {
    # a whole number may be larger than every float
    "alpha": (lambda v: 0.0 < v <= sys.float_info.max, "a finite number > 0"),
    "dropout": (lambda v: 0.0 <= v < 1.0, "in [0, 1)"),
    "temperature": (
        lambda v: LEAST_TEMPERATURE <= v <= sys.float_info.max,
        f"a finite number >= {LEAST_TEMPERATURE}",
    ),
    "scaling": (lambda v: v in ("alpha/r", "alpha/sqrt(r)"), "'alpha/r' or 'alpha/sqrt(r)'"),
    "adapter_dtype": (lambda v: v in list(DTYPES), f"one of {sorted(DTYPES)}"),
    "backend": (lambda v: v in list(BACKENDS), f"one of {list(BACKENDS)}"),
    "modules_to_save": (lambda v: v is None or _are_names(v), "a list of module names"),
    "base_fingerprint": (
        lambda v: v is None or re.fullmatch(r"\w+(:([0-9a-f]{16}|-)){2}", str(v)),
        "what floe wrote",
    ),
}


@dataclass
class FloeConfig(peft.PeftConfig):
    """Which linears get routed low-rank experts, and how large.

    Args:
        r: rank, >= 1. num_experts: M >= 1. alpha: scaling is alpha / r.
        dropout: in [0, 1), in steps of 1/256, on the adapter's input; the router sees x undropped.
        target_modules: names of projections inside a decoder block, for example
            ``["gate_proj", "up_proj", "down_proj"]``; fused ones (``gate_up_proj``) count under
            their own name. None: the block's feed-forward (FLoE Table 6).
        layers: 0-based indices of the blocks to adapt; None = all.
        layer_modules: ``{layer index: projection names}``: exactly these are adapted, instead of
            the same ``target_modules`` on every one of ``layers``.
        rank_pattern, expert_pattern: per-layer overrides, ``{layer index: value}``; also by exact
            module path.
        top_k: a token uses the experts of its ``top_k`` largest router logits, weighted by a
            softmax over these; 0 (default) = all. temperature: >= 1e-6, divides the logits.
        shared_a: one A for all experts (HydraLoRA's layout), or else one for each (LoRAMoE's).
        scaling: "alpha/r" or "alpha/sqrt(r)".
        adapter_dtype: storage of the adapter, "float32" (default), "bfloat16" or "float16";
            products run in the dtype of the activations either way.
        share_input: whether adapted projections of one input (q/k/v, gate/up) run as one op, which
            reads it once and draws one dropout mask for all of them.
        backend: which implementation runs: "auto", or a name of :mod:`floe_triton.dispatch`
            ("eager" is plain torch, everywhere).
        modules_to_save: names of further modules that are trained whole and saved with the adapter
            (a classifier's head is, without being named), as PEFT does it.
        trainable_token_indices: rows of the embedding that are trained and saved, likewise.
        seed: of the initial values; a layer's depend on the seed and its path alone.
        base_fingerprint: of the weights that a saved adapter belongs to, written by floe; on others
            it is refused. None: on any.

    Raises:
        ValueError: for a value out of range, or a file written by a newer format than this version
            reads.
    """

    r: int = 8
    num_experts: int = 4
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: list[str] | None = None
    layers: list[int] | None = None
    layer_modules: dict[str, list[str]] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    expert_pattern: dict[str, int] = field(default_factory=dict)
    top_k: int = 0
    temperature: float = 1.0
    shared_a: bool = True
    scaling: str = "alpha/r"
    adapter_dtype: str = "float32"
    share_input: bool = True
    backend: str = "auto"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    seed: int = 41
    base_fingerprint: str | None = None
    floe_format: int = FORMAT

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """Refuse unknown settings: PEFT would drop those of a saved adapter with a warning."""
        unknown = sorted(settings.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(
                f"unknown settings {unknown}: written by a newer floe or edited, or misspelt"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self._on_base: str | None = None  # fingerprint of the base that it is being saved from
        if not isinstance(self.floe_format, int) or not 1 <= self.floe_format <= FORMAT:
            raise ValueError(
                f"floe_format must be in [1, {FORMAT}] for this version of floe, "
                f"got {self.floe_format!r}: a larger one was written by a newer floe; "
                "upgrade to read it"
            )
        for name, (kind, rule) in _TYPES.items():
            value = getattr(self, name)
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            require(fits, f"{name} must be {rule}", value, TypeError)
        for name, (fit, rule) in _VALUES.items():
            value = getattr(self, name)
            require(bool(fit(value)), f"{name} must be {rule}", value)
        for name in ("r", "num_experts"):
            _size(name, getattr(self, name))
        names = self.target_modules
        if names is not None:
            rule = (
                "target_modules must be a list of projection names such as ['gate_proj', "
                "'up_proj', 'down_proj'] (patterns are not supported)"
            )
            require(_are_names(names), rule, names)
            require(len(names) > 0, "target_modules must name a projection or be None", names)
            self.target_modules = sorted(set(names))
        if self.layers is not None:
            self.layers = _checked_layers(self.layers)
        if self.layer_modules:
            self._spread_modules()
        for name in ("rank_pattern", "expert_pattern"):
            pattern, rule = getattr(self, name), "must map layer indices or module paths to sizes"
            require(isinstance(pattern, dict), f"{name} {rule}", pattern, TypeError)
            keys = list(map(str, pattern))
            require(len(set(keys)) == len(keys), f"{name} must name each key once", keys)
            setattr(self, name, {str(key): _size(name, value) for key, value in pattern.items()})
        fewest = min([self.num_experts, *self.expert_pattern.values()])
        rule = f"top_k must be 0 (all) or in [1, {fewest}], the fewest experts of a layer"
        require(0 <= self.top_k <= fewest, rule, self.top_k)

    def _spread_modules(self) -> None:
        """``layers`` and ``target_modules`` from ``layer_modules``, as their union."""
        given = self.layer_modules
        rule = "layer_modules must map layer indices to projection names, at least one each"
        fits = isinstance(given, dict) and all(n and _are_names(n) for n in given.values())
        require(fits, rule, given)
        for key in given:  # JSON writes them as text
            require(str(key).isdecimal(), "layer_modules keys must be block indices >= 0", key)
        layers = _checked_layers([int(key) for key in given])
        targets = sorted({name for names in given.values() for name in names})
        for name, union in (("layers", layers), ("target_modules", targets)):
            rule = f"{name} must be left out or {union} with these layer_modules"
            require(getattr(self, name) in (None, union), rule, getattr(self, name))
        self.layers, self.target_modules = layers, targets
        self.layer_modules = {str(int(key)): sorted(set(v)) for key, v in given.items()}

    def to_dict(self) -> dict[str, Any]:
        """What is written to disk: the settings, with the fingerprint of the base they are on."""
        values: dict[str, Any] = super().to_dict()
        return values | {"base_fingerprint": self._on_base or self.base_fingerprint}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **options: Any
    ) -> FloeConfig:
        """The settings in a folder, or in a repository of the hub.

        Raises:
            FileError: they are missing, damaged, of another method or a newer floe.
        """
        folder = local(pretrained_model_name_or_path, (CONFIG,), subfolder, **options)
        return cls.from_settings(read_settings(folder)[0], folder)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], folder: Path) -> FloeConfig:
        """What was read from ``folder``; FileError where a setting is unknown or out of range."""
        try:
            return cls(**{name: value for name, value in settings.items() if name != "peft_type"})
        except (ValueError, TypeError) as error:
            raise FileError(folder / CONFIG, str(error)) from error

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write the settings, and seal them with the tensors that PEFT has written before them."""
        super().save_pretrained(save_directory, **options)
        seal(Path(save_directory))

    def at(self, path: str, layer: int | None = None) -> AdapterSettings:
        """Settings of the adapter at a module's path; patterns may name the path or its layer."""
        patterns = (self.rank_pattern, self.r), (self.expert_pattern, self.num_experts)
        rank, experts = (p.get(path, p.get(str(layer), default)) for p, default in patterns)
        scaling = float(self.alpha) / (rank if self.scaling == "alpha/r" else rank**0.5)
        dropout = float(self.dropout)
        return AdapterSettings(
            rank,
            experts,
            scaling,
            dropout,
            self.backend,
            self.share_input,
            self.top_k,
            float(self.temperature),
            self.shared_a,
        )


def _size(name: str, value: Any) -> int:
    whole, rule = not isinstance(value, bool), f"{name} must be a whole number >= 1"
    require(isinstance(value, int) and whole, rule, value, TypeError)
    require(value >= 1, rule, value)
    return int(value)


def _checked_layers(layers: Any) -> list[int]:
    values = [layers] if isinstance(layers, int) else list(layers)
    for value in values:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        require(whole and value >= 0, "layers must be block indices >= 0", value)
    if not values:
        raise ValueError("layers must name at least one block, got an empty list")
    return sorted({int(value) for value in values})
