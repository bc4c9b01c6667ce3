"""How a class is the schema of its file: its fields are the keys, their types the rules.

:func:`read` checks a file against its class. What is wrong is a FileError with the file, the key,
the rule and what came. Unknown keys are passed over. Values made in Python are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    InstanceOf,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from floe.errors import FileError, shown
from floe.storage import read_json, write_json
from floe.types import Floats

T = TypeVar("T")

IF_SET = {"written": "if set"}  # metadata of a field that is left out of the file while empty
NEVER = {"written": "never"}  # of a field that is not in the file


def read(kind: type[T], path: str | os.PathLike[str], layers: int | None = None) -> T:
    """The ``kind`` that a JSON file holds; ``layers`` is the model's number of them, if known.

    Raises:
        FileError: the file is missing or damaged, or a key is missing or breaks its rule.
    """
    return parse(kind, read_json(Path(path)), path, layers)


def parse(kind: type[T], value: Any, path: str | os.PathLike[str], layers: int | None = None) -> T:
    """:func:`read` of JSON that is in memory already; ``path`` is where it came from."""
    adapter, context = _adapter(kind), {"layers": layers}  # type: ignore[arg-type]
    try:
        parsed: T = adapter.validate_python(value, context=context)
        return parsed
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
    # raised out here: the text of pydantic's error would hold values, passwords among them
    rule = ""
    if item["type"] == "missing":
        rule = _rule_of_missing(adapter, value, item["loc"], context)
    raise FileError(path, _explain(item, rule))


def write(path: Path, value: Any) -> None:
    """Write a value as JSON that :func:`read` takes, whole or not at all."""
    write_json(path, document(value))


def document(value: Any) -> Any:
    """A value as JSON has it: dataclasses are objects, arrays and tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name), f.metadata.get("written")) for f in fields(value))
        return {
            name: document(part)
            for name, part, written in pairs
            if written is None or (written == "if set" and part is not None and part != {})
        }
    if isinstance(value, Mapping):
        return {str(key): document(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [document(part) for part in value] if isinstance(value, list | tuple) else value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


# what is wrong, in words

_RULES = {  # pydantic's kind of error -> the rule of one value, and of each in a list
    "int_type": ("a whole number", "whole numbers"),
    "float_type": ("a number", "numbers"),
    "is_instance_of": ("a string", "strings"),
    "bool_type": ("true or false", "true or false"),
    "tuple_type": ("a list", "lists"),
    "list_type": ("a list", "lists"),
    "dict_type": ("an object", "objects"),
    "dataclass_type": ("an object", "objects"),
}


def broken(rule: str) -> PydanticCustomError:
    """What a validator of a field raises for a value that breaks ``rule``."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def _explain(item: Any, rule_of_missing: str) -> str:
    """One of pydantic's errors as: name, rule, what came."""
    kind, place, got = item["type"], item["loc"], shown(item["input"])
    if kind == "value_error":  # a class's own check, which says all of it
        return f"{_name(place)}: {item['ctx']['error']}".removeprefix(": ")
    if kind == "missing":
        return f"{_name(place)} is missing{rule_of_missing}"
    if kind == "unexpected_keyword_argument":
        return f"{_name(place)} is no key that is known here"
    if place and place[-1] == "[key]":
        return f"{_name(place[:-2])} must have whole numbers as keys, got {got}"
    if len(place) > 1 and isinstance(place[-1], int) and kind in _RULES:
        name, index = _name(place[:-1]), place[-1]
        return f"{name} must be a list of {_RULES[kind][1]}, got {got} as number {index}"
    return f"{_name(place)} must be {_rule(item)}, got {got}"


def _rule(item: Any) -> str:
    context = item.get("ctx", {})
    if item["type"] == "rule":
        return str(context["rule"])
    if item["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    rule, _ = _RULES.get(item["type"], (str(item["msg"]), ""))
    return rule


def _rule_of_missing(
    adapter: TypeAdapter[Any], value: Any, place: tuple[int | str, ...], context: dict[str, Any]
) -> str:
    """The rule that any wrong value in this place would break."""
    around = value
    for step in place[:-1]:
        around = around[step]
    if not isinstance(around, dict):
        return ""
    around[place[-1]] = ...
    try:
        adapter.validate_python(value, context=context)
    except ValidationError as error:
        items = [e for e in error.errors(include_url=False) if e["loc"] == place]
        return f"; it must be {_rule(items[0])}" if items else ""
    finally:
        del around[place[-1]]
    return ""


def _name(place: tuple[int | str, ...]) -> str:
    """``trials[2].state`` for the place of a value."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps).removeprefix(".")[:200]


# types of fields

Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]  # NaN and infinities too: a diverged run is a result
Text = InstanceOf[str]  # any, also what is no Unicode
Flag = Annotated[bool, Strict()]


def _total(info: ValidationInfo) -> int | None:
    """The model's number of layers, where the reader knows it."""
    return info.context.get("layers") if info.context else None


def _below(total: int | None) -> str:
    return ">= 0" if total is None else f"in [0, {total})"


def _holds(value: Any, *types: type) -> bool:
    """Whether a value is a list of these types; true and false are no numbers here."""
    return isinstance(value, list) and all(type(part) in types for part in value)


def _check_layer(value: int, info: ValidationInfo) -> int:
    if not 0 <= value < (_total(info) or 2**31):
        raise broken(_below(_total(info)))
    return value


def _check_layers(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    total = _total(info)
    ascending = _holds(value, int) and value and value == sorted(set(value))
    if not ascending or value[0] < 0 or value[-1] >= (total or 2**31):
        raise broken(f"ascending layer indices {_below(total)}")
    return tuple(value)


def _check_ranking(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    total = _total(info)
    if not _holds(value, int) or sorted(value) != list(range(total or len(value))):
        raise broken(f"a permutation of the layer indices {_below(total)}")
    return tuple(value)


def _check_each_layer(value: Any, info: ValidationInfo) -> tuple[Any, ...]:
    total = _total(info)
    if not _holds(value, int, float) or len(value) != (total or len(value)):
        raise broken(f"a list of {'' if total is None else f'{total} '}numbers")
    return tuple(value)


def _check_scores(value: Any, info: ValidationInfo) -> Floats:
    total = _total(info)
    whole = _holds(value, int, float) and len(value) == (total or len(value))
    if not whole or not np.isfinite(value).all():
        raise broken(f"a list of {'' if total is None else f'{total} '}finite numbers")
    return np.asarray(value, dtype=np.float64)


def _check_curve(value: Any) -> tuple[tuple[float, float], ...]:
    points = isinstance(value, list) and all(
        _holds(point, int, float, type(None)) and len(point) == 2 and point[0] is not None
        for point in value
    )
    if not points:
        raise broken("a list of [step, loss] pairs")
    return tuple((step, float("nan") if loss is None else float(loss)) for step, loss in value)


Layer = Annotated[int, Strict(), AfterValidator(_check_layer)]
Layers = Annotated[tuple[int, ...], PlainValidator(_check_layers)]
Ranking = Annotated[tuple[int, ...], PlainValidator(_check_ranking)]
LayerNumbers = Annotated[tuple[float, ...], PlainValidator(_check_each_layer)]
LayerScores = Annotated[Floats, PlainValidator(_check_scores)]
Curve = Annotated[Sequence[tuple[float, float]], PlainValidator(_check_curve)]


def as_long_as(other: str, of: str = "numbers") -> AfterValidator:
    """The rule of a list that has an entry for each of the field ``other``, which comes before."""

    def check(value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        wanted = info.data.get(other)
        if wanted is not None and len(value) != len(wanted):
            raise broken(f"a list of {len(wanted)} {of}")
        return value

    return AfterValidator(check)


def square(other: str) -> BeforeValidator:
    """The rule of a matrix with a row and a column for each of the field ``other``."""

    def check(value: Any, info: ValidationInfo) -> Any:
        size = len(info.data.get(other, ()))
        rows: list[Any] = value if isinstance(value, list) and len(value) == size else [None]
        if not all(_holds(row, int, float, type(None)) and len(row) == size for row in rows):
            raise broken(f"a {size} by {size} matrix of numbers or null")
        return value

    return BeforeValidator(check)
