"""The YAML of a run: read strictly, changed by ``--set``, validated, and written again.

PyYAML's safe loader takes the last of two equal keys, lets a kilobyte of aliases stand for
gigabytes, reads 010 as 8, and fails in many ways on a tag that does not fit. So the values are made
from the parser's events here: nothing is said twice, nothing grows, and only plain values come out.
Messages give the line, and nothing of the text: it may be secret.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from floe.config import RunConfig
from floe.errors import FileError, hide_secrets, one_line, shown

TEMPLATE = Path(__file__).with_name("template.yaml")
"""A commented configuration to start from."""
_LISTED = 1500  # characters of all problems in a message
_TEXT, _VALUES, _DEPTH, _NUMBER = 1 << 20, 20_000, 32, 64
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, Any] = {
    f"{_TAG}{name}": getattr(yaml.constructor.SafeConstructor, f"construct_yaml_{name}")
    for name in ("null", "bool", "int", "float", "str")
}
_OTHERWISE = {  # by YAML 1.1: octal and sexagesimal numbers, and any text that is tagged as null
    "int": re.compile(r"[-+]?0[0-9_]|.*:"),
    "float": re.compile(r".*:"),
    "null": re.compile(r"(?!(?:~|null|Null|NULL)?\Z)"),
}
_UNFIT = (ValueError, LookupError, AttributeError, OverflowError)  # of PyYAML's constructors


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides, validate.

    Relative data and model paths are the file's.

    Raises:
        FileError: missing or unreadable file, or text that is not a mapping, or says a thing twice.
        ValueError: an unknown key (with the nearest known one) or a value out of range, every one
            listed (as far as 1,500 characters go), none with a password.
    """
    try:
        with open(os.fspath(path), "rb") as file:
            data = read_yaml(file.read(_TEXT + 1).decode("utf-8"))
    except OSError as error:
        raise FileError(path, f"cannot be read as YAML: {error.strerror}") from error
    except ValueError as error:
        raise FileError(path, f"cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise FileError(path, f"must hold a mapping of settings, got {type(data).__name__}")
    for override in overrides or []:
        _apply(data, override)
    _resolve_paths(data, Path(path).resolve().parent)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> RunConfig:
    """Validate a mapping; ValueError lists the problems with their places, as load_config does."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # raised out here: the text of pydantic's error would hold the values, passwords among them
    lines: list[str] = []
    for line in map(_explain, problems):
        if sum(map(len, lines)) + len(line) > _LISTED:
            lines.append(f"and {len(problems) - len(lines)} more")
            break
        lines.append(line)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise ValueError("\n  ".join([f"the configuration has {count}:", *lines]))


def dump_config(config: RunConfig) -> str:
    """The whole resolved configuration as YAML, passwords in URLs masked."""
    return yaml.safe_dump(
        _masked(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True
    )


def _masked(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _masked(part, name) for name, part in value.items()}
    hides = key in ("storage", "path", "hub") and isinstance(value, str)
    return hide_secrets(value, url=True) if hides else value


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override must read a.b=value, got {shown(override)}")
    *parents, last = key.strip().split(".")
    for name in parents:
        node = data.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {shown(override)}: {shown(name)} is not a section")
        data = node
    try:
        data[last] = read_yaml(value)
    except ValueError as error:
        problem = f"override {shown(override)}: the value cannot be read as YAML: {error}"
        raise ValueError(problem) from None


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Relative files are found beside the configuration, wherever the command runs."""
    for place in ("model", "data.train", "data.validation", "data.test", "score.taylor_data"):
        source: Any = data
        for name in place.split("."):
            source = source.get(name) if isinstance(source, dict) else None
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            beside = str(folder / source["path"])
            if not Path(source["path"]).is_absolute() and os.path.exists(beside):  # never raises
                source["path"] = beside


def _explain(item: Any) -> str:
    parts = [str(part)[:60] for part in item["loc"]]
    place = one_line(".".join(parts), 120) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _fields_at(item["loc"][:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{place}: unknown setting; {hint}"
    # our own rules say themselves what came, and a storage is nobody's to see
    quiet = item["type"] == "value_error" or "storage" in parts
    got = "" if quiet else f", got {shown(item.get('input'))}"
    return f"{place}: {one_line(item['msg'], 600)}{got}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next(
            (o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model
        )
    return sorted(model.model_fields)


def read_yaml(text: str) -> Any:
    """The one document in ``text``: None, bool, int, float, str, lists and maps with text keys.

    Raises:
        ValueError: broken YAML, a key twice, a tag, a date, a number that YAML 1.1 reads otherwise
            than it looks, or more than 20,000 values once aliases are expanded.
    """
    if len(text) > _TEXT:
        raise ValueError(f"it must be at most {_TEXT:,} characters long, got {len(text):,}")
    try:
        loader = _Loader(text)
        try:
            return _Reading(loader).document()
        finally:
            loader.dispose()
    except UnicodeError:
        problem = "it must be text that UTF-8 can hold"
    except yaml.reader.ReaderError as error:
        problem = f"character {error.position + 1} is not allowed ({error.reason})"
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        problem = f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem}"
    raise ValueError(problem)


class _Reading:
    """One document's events as values; an alias is a copy, so that no two settings share one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.anchors: dict[str, Any] = {}
        self.left = _VALUES

    def document(self) -> Any:
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            return None
        self.loader.get_event()
        value = self._value(0)
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            raise _wrong(self.loader.peek_event(), "there must be one document, a second starts")
        return value

    def _value(self, depth: int) -> Any:
        event = self.loader.get_event()
        self._count(event, depth)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise _wrong(event, "the alias names no value before it")
            return self._copy(self.anchors[event.anchor], event, depth)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif event.tag not in (None, "!", f"{_TAG}seq", f"{_TAG}map"):
            raise _wrong(event, "tags are not allowed")
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not self.loader.check_event(yaml.SequenceEndEvent):
                value.append(self._value(depth + 1))
            self.loader.get_event()
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            key = self.loader.get_event()
            line = key.start_mark.line + 1
            self._count(key, depth)
            if not isinstance(key, yaml.ScalarEvent):
                raise _wrong(key, "a setting's name must be text")
            name, is_merge = key.value, self._tag(key) == f"{_TAG}merge"
            if not is_merge and not isinstance(self._scalar(key), str):
                raise _wrong(key, "a setting's name must be text; quote it")
            if name in lines:
                raise _wrong(key, f"{name[:60]!r} occurs twice, first in line {lines[name]}")
            lines[name] = line
            value = self._value(depth + 1)
            if not is_merge:
                values[name] = value
                continue
            for part in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(part, dict):
                    raise _wrong(key, "<< takes a map or a list of maps")
                merged |= part
        self.loader.get_event()
        return merged | values

    def _tag(self, event: Any) -> str:
        if event.tag not in (None, "!"):
            return str(event.tag)
        return str(self.loader.resolve(yaml.ScalarNode, event.value, event.implicit))

    def _scalar(self, event: Any) -> Any:
        tag, text = self._tag(event), event.value
        if tag == f"{_TAG}value":  # a bare =
            tag = f"{_TAG}str"
        if tag not in _SCALARS:
            date = tag == f"{_TAG}timestamp" and event.tag is None
            raise _wrong(event, "quote a date" if date else "tags are not allowed")
        kind = tag.removeprefix(_TAG)
        if kind in ("int", "float") and len(text) > _NUMBER:
            raise _wrong(event, f"a number must have at most {_NUMBER} characters")
        if kind in _OTHERWISE and _OTHERWISE[kind].match(text):
            raise _wrong(event, f"this is another !!{kind} than it looks; no leading 0, no colon")
        try:
            value = _SCALARS[tag](self.loader, yaml.ScalarNode(tag, text))
        except _UNFIT:
            raise _wrong(event, f"this is not of the type !!{kind}") from None
        if isinstance(value, str) and not _is_writable(value):
            raise _wrong(event, "text must not hold NUL or half of a surrogate pair")
        return value

    def _copy(self, value: Any, event: Any, depth: int) -> Any:
        self._count(event, depth)
        if isinstance(value, list):
            return [self._copy(part, event, depth + 1) for part in value]
        if isinstance(value, dict):
            return {name: self._copy(part, event, depth + 1) for name, part in value.items()}
        return value

    def _count(self, event: Any, depth: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise _wrong(event, f"there must be at most {_VALUES:,} values, aliases expanded")
        if depth > _DEPTH:
            raise _wrong(event, f"values must be nested at most {_DEPTH} deep")


def _is_writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _wrong(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
