"""Adapters: the adapted linear layer, its PEFT method, its files.

Importing this package registers floe with PEFT.
"""

from floe.adapters.config import FloeConfig as FloeConfig
from floe.adapters.linear import MoELoRALinear as MoELoRALinear
from floe.adapters.linear import separate_base as separate_base
from floe.adapters.targets import adapted_layers as adapted_layers
from floe.adapters.targets import adapted_modules as adapted_modules
from floe.adapters.targets import parameter_counts as parameter_counts
from floe.adapters.targets import remove_adapters as remove_adapters
from floe.adapters.tuner import get_model as get_model
