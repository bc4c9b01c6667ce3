"""floe as a PEFT method: everything built on PEFT takes a ``FloeConfig``.

``get_peft_model``, the Hugging Face ``Trainer``, ``save_pretrained`` and
``PeftModel.from_pretrained`` work as for any method of PEFT's own, once this module has been
imported in the process.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from floe.adapters.config import DTYPES, FloeConfig, peft_type
from floe.adapters.fingerprint import check_base, fingerprint, foreign_adapters
from floe.adapters.folder import (
    CONFIG,
    PREFIX,
    TENSORS,
    adapter_tensors,
    check_adapter_name,
    check_tensors,
    current_names,
    holds_adapter,
    local,
    read_settings,
    read_tensors,
    saved_whole,
    with_adapter_name,
)
from floe.adapters.linear import MoELoRALinear, module_generator
from floe.adapters.targets import (
    INPUT_HOOKS,
    adapted_modules,
    adapter_shapes,
    by_path,
    feed_forward,
    linear_of,
    link_shared_inputs,
    remove_adapters,
    target_paths,
)
from floe.decoder_blocks import base_of, find_blocks
from floe.errors import require

# Base model -> its tuner: whether somebody still holds the adapted model.
_TUNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FloeModel]] = weakref.WeakKeyDictionary()


class FloeModel(BaseTuner):
    """PEFT's tuner of floe: wraps the chosen projections in :class:`MoELoRALinear`.

    Adapters of other methods that the base model carries belong to it: they stay as they are,
    frozen, and are not saved.
    """

    prefix = "floe_"
    tuner_layer_cls = MoELoRALinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        bare = not adapted_modules(model)
        there = {} if bare else getattr(model, "peft_config", {})
        _refuse_carrier(model, isinstance(model, peft.PeftModel) or adapter_name in there)
        if bare:
            model._floe_base = {  # type: ignore[assignment]
                "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
                "peft_config": model.__dict__.pop("peft_config", None),
                "hooks": {name: vars(model)[name] for name in INPUT_HOOKS if name in vars(model)},
            }
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            if bare:
                remove_adapters(model)
            raise
        _TUNERS[model] = weakref.ref(self)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check the name, later a folder's, and add the adapter; every way to add comes here."""
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        if _READ in vars(config):  # nothing large is made, or wrapped, for a file that does not fit
            tensors = current_names(vars(config)[_READ])
            tensors = {name: t for name, t in tensors.items() if f".{self.prefix}" in name}
            check_tensors(tensors, adapter_shapes(model, config))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        link_shared_inputs(model)
        for module in foreign_adapters(model):
            module.requires_grad_(False)  # PEFT leaves them trainable

    def _prepare_adapter_config(
        self, peft_config: FloeConfig, model_config: dict[str, Any]
    ) -> FloeConfig:
        model = self.model
        targets = target_paths(model, peft_config)
        for path in targets:  # all of them, before the first is wrapped
            linear_of(model, path)
        model._floe_fingerprint = fingerprint(model)
        check_base(peft_config, model)
        if peft_config.target_modules is None:
            names = {name for block in find_blocks(model) for name in feed_forward(block)}
            peft_config.target_modules = sorted(names)
        # Not a field: it follows from the others, and PEFT writes fields to disk.
        peft_config._targets = targets  # type: ignore[attr-defined]
        peft_config.rank_pattern = by_path("rank_pattern", peft_config.rank_pattern, targets)
        peft_config.expert_pattern = by_path("expert_pattern", peft_config.expert_pattern, targets)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: FloeConfig, key: str) -> bool:
        return key in peft_config._targets  # type: ignore[attr-defined]

    def _create_and_replace(
        self,
        peft_config: FloeConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer: Any = target if isinstance(target, MoELoRALinear) else MoELoRALinear(target)
        layer.update_layer(
            adapter_name,
            peft_config.at(current_key),
            module_generator(peft_config.seed, current_key),
            DTYPES[peft_config.adapter_dtype],
            _runs_on(layer.base_layer, self.model),
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: ``adapter_dtype`` says what the adapter is stored in."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for wrapper in self._wrappers():
            wrapper.enable_adapters(enabled)

    def _wrappers(self) -> list[Any]:
        kinds = (MoELoRALinear, AuxiliaryTrainingWrapper)
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kw: Any) -> nn.Module:
        if merge:
            next(iter(adapted_modules(self.model).values())).merge()  # raises, and says why
        return remove_adapters(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's mixed batches: hand ``adapter_names`` to every layer that can act on it."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must be None in training mode, got names")
        unknown = sorted(set(names) - {"__base__", *self.peft_config})
        rule = f"adapter_names must be among {sorted(self.peft_config)} or '__base__'"
        require(not unknown, rule, unknown)
        beams = kwargs.get("num_beams") or 1
        repeated = {"adapter_names": [name for name in names for _ in range(beams)]}
        with ExitStack() as hooks:
            for module in self._wrappers():
                handle = module.register_forward_pre_hook(
                    lambda _module, args, options: (args, options | repeated), with_kwargs=True
                )
                hooks.callback(handle.remove)
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors, whole; its configuration then says what they are.

        Raises:
            ValueError: a tensor is missing or not whole, as on one of several workers, or they
                differ in dtype.
        """
        tensors = {}
        for name, shape in adapter_tensors(model, adapter_name).items():
            tensor = state_dict.get(name)
            if tensor is None or tuple(tensor.shape) != shape or tensor.is_meta:
                there = "nothing" if tensor is None else f"{tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(
                    f"{name} must be whole, {shape}, to be saved, got {there}: "
                    "gather sharded parameters first"
                )
            tensors[name] = tensor
        dtypes = {tensor.dtype for tensor in tensors.values()}
        known = {dtype: name for name, dtype in DTYPES.items()}
        if len(dtypes) != 1 or not dtypes <= known.keys():
            raise ValueError(
                f"adapter {adapter_name!r} must be of one dtype, of {sorted(DTYPES)}, to be saved, "
                f"got {sorted(map(str, dtypes))}"
            )
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} must hold finite values to be saved, got NaN or infinity")
        _check_config(model, config, adapter_name)
        config.adapter_dtype = known[dtypes.pop()]  # not what it was made as: what it is
        config._on_base = getattr(base_of(model), "_floe_fingerprint", None)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            config._on_base = fingerprint(model) or config._on_base  # else weights may be parts
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The file's names as the model's.

        Beside the adapter there may be modules that are saved whole, and embeddings that were
        resized. Tensors that came with the configuration are what is loaded, whatever PEFT has read
        since; where they are refused, the adapter that was made for them is taken off again.

        Raises:
            ValueError: for missing, foreign or damaged tensors, which PEFT would let pass.
        """
        read = vars(config).pop(_READ, None)
        if read is not None:
            try:
                read = with_adapter_name(model, adapter_name, read)
                return cls._remap_adapter_state_dict_for_load(model, config, adapter_name, read)
            except BaseException:
                adapted: Any = model
                if list(adapted.peft_config) == [adapter_name]:
                    remove_adapters(adapted)
                else:
                    adapted.delete_adapter(adapter_name)
                raise
        try:
            _check_resumed(model, adapter_name, state_dict)
        finally:
            _just_read.clear()
        expected = {
            n.removeprefix(PREFIX): s for n, s in adapter_tensors(model, adapter_name).items()
        }
        full = {name.replace(f".{adapter_name}.weight", ".weight"): name for name in expected}
        tensors = {full.get(name, name): t for name, t in current_names(state_dict).items()}
        state, beside = model.state_dict(), saved_whole(model)
        places = {name.removeprefix(PREFIX): name for name in state}
        expected |= {n: tuple(state[places[n]].shape) for n in tensors if places.get(n) in beside}
        check_tensors(tensors, expected)
        return {places[name]: tensor for name, tensor in tensors.items()}


def _check_config(model: nn.Module, config: FloeConfig, adapter_name: str) -> None:
    """ValueError where the configuration is no longer what the adapter was made by."""
    for path, module in adapted_modules(model).items():
        if adapter_name in module.settings:
            says = config.at(path.replace("_fsdp_wrapped_module.", "")).function()
            made = module.settings[adapter_name].function()
            if says != made:
                raise ValueError(
                    f"adapter {adapter_name!r} has rank, experts and scaling {made} at {path}, "
                    f"which its configuration must say, got {says}"
                )


_just_read: list[tuple[FloeConfig, dict[str, Tensor]]] = []  # the last folder's, until it is loaded


def _check_resumed(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """ValueError where a folder is loaded into an adapter that is there, of another function."""
    ids = {*map(id, tensors.values())}
    for config, read in _just_read:
        if ids & {*map(id, read.values())}:
            check_base(config, base_of(model))
            _check_config(model, config, adapter_name)


def _refuse_carrier(model: nn.Module, carries: bool) -> None:
    if carries:
        raise ValueError(
            "base_model must not carry an adapter, got one with "
            f"{sorted(getattr(model, 'peft_config', {}))}: "
            "floe.adapters.remove_adapters(model) takes it off, model.add_adapter adds another"
        )


def _runs_on(base_layer: nn.Module, model: nn.Module) -> torch.device | None:
    """Where an offloaded layer computes; None where its own device says so."""
    hook = getattr(base_layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        place = getattr(each, "execution_device", None)
        if place is not None:
            return torch.device(place)
    offloaded = hasattr(model, "hf_device_map") and any(p.is_meta for p in base_layer.parameters())
    return torch.device("cpu") if offloaded else None


def get_model(base_model: nn.Module, config: FloeConfig, seed: int | None = None) -> peft.PeftModel:
    """``base_model`` with fresh adapters, all other parameters frozen.

    B is zero, so outputs are unchanged.

    Args:
        base_model: a Hugging Face model, changed in place (its projections are wrapped). Adapters
            of an adapted model that nobody holds any more are taken off first.
        config: which layers, rank, experts. Its task type is CAUSAL_LM where none is given and the
            model generates.
        seed: replaces ``config.seed`` when given.

    Raises:
        ValueError: for layers or modules the model does not have, or a model that carries a floe
            adapter; the model is then as it was.
    """
    if not isinstance(config, FloeConfig):
        raise TypeError(f"config must be a FloeConfig, got {type(config).__name__}")
    config = dataclasses.replace(config) if seed is None else dataclasses.replace(config, seed=seed)
    if config.task_type is None and hasattr(base_model, "prepare_inputs_for_generation"):
        config.task_type = "CAUSAL_LM"
    take_off_unheld(base_model)
    config.base_model_name_or_path = getattr(base_model, "name_or_path", None) or None
    return wrap(base_model, config)


def wrap(
    base_model: nn.Module, config: FloeConfig, adapter_name: str = "default"
) -> peft.PeftModel:
    """The adapted model, of PEFT's class for the task; the base as it was where that fails."""
    fits = isinstance(base_model, nn.Module) and isinstance(config, FloeConfig)
    kinds = type(base_model).__name__, type(config).__name__
    require(fits, "base_model and config must be a module and a FloeConfig", kinds, TypeError)
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    try:
        with warnings.catch_warnings():  # PEFT asks by a name that transformers has deprecated
            text = "`is_gradient_checkpointing` is deprecated"
            warnings.filterwarnings("ignore", text, FutureWarning)
            return kind(base_model, config, adapter_name, autocast_adapter_dtype=False)
    except AttributeError as error:
        remove_adapters(base_model)
        raise ValueError(
            f"task_type must be one that a {type(base_model).__name__} can do, "
            f"got {config.task_type}: {error}"
        ) from error


def take_off_unheld(base_model: nn.Module) -> None:
    """Remove floe's adapters where nobody holds the adapted model any more; else ValueError."""
    adapted = bool(adapted_modules(base_model))
    if adapted:
        gc.collect()  # of a cycle through the adapted model
    tuner = _TUNERS.get(base_model) if adapted else None
    held = tuner is not None and tuner() is not None
    _refuse_carrier(base_model, isinstance(base_model, peft.PeftModel) or held)
    if adapted:
        remove_adapters(base_model)


_READ = "_read_tensors"  # attribute of a configuration whose tensors are yet to be loaded


def _read_adapter(folder: Path) -> tuple[FloeConfig, dict[str, Tensor]]:
    settings, raw = read_settings(folder)
    return FloeConfig.from_settings(settings, folder), read_tensors(folder, settings, raw)


def loaded_config(folder: Path) -> tuple[FloeConfig, dict[str, Tensor]]:
    """The adapter in ``folder``, its configuration carrying its tensors until they are loaded.

    Raises:
        FileError: they are not what was saved.
    """
    config, tensors = _read_adapter(folder)
    setattr(config, _READ, tensors)
    return config, tensors


class _Loaded(FloeConfig):
    """What PEFT makes a saved adapter's configuration with."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return FloeConfig(*args, **settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **options: Any
    ) -> FloeConfig:
        """PeftModel.from_pretrained and load_adapter call this, then load the tensors."""
        files = (CONFIG, TENSORS)
        return loaded_config(local(pretrained_model_name_or_path, files, subfolder, **options))[0]


def _strictly(load: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's reading of tensors, and from floe's folders what was saved, or a FileError.

    PEFT asks no method where it loads into an adapter that is there, as the Trainer does to resume.
    """

    @wraps(load)
    def load_strictly(model_id: Any, *args: Any, **options: Any) -> Any:
        folder = Path(model_id, options.get("subfolder") or "")
        if not holds_adapter(folder):
            return load(model_id, *args, **options)
        _just_read[:] = [_read_adapter(folder)]
        return _just_read[0][1]

    return load_strictly


peft_type()
if "FLOE" not in {getattr(key, "value", key) for key in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}:
    register_peft_method(name="floe", config_cls=_Loaded, model_cls=FloeModel, prefix="floe_")
    peft.peft_model.load_peft_weights = _strictly(peft.peft_model.load_peft_weights)
