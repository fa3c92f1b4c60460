"""From `--config FILE[:options]` and `--config.field=value` to a locked `ConfigDict`; every mistake is one line.

A config file is Python with a function `get_config(options)`, which is executed, or JSON with all fields. What a field
may be says `cimjax.training.config.fields`. (The flags of `ml_collections` refuse that anything becomes None or stops
being it, and end in a traceback where a name or a file is wrong.) jax is not imported here, so that a mistake is
answered at once.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import traceback
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from cimjax.spec import VariationSpec
from cimjax.spec.base import closest, nearest, shortened
from cimjax.training.config.fields import TEXT, completed, field_of
from cimjax.training.config.refusals import OptionError

_PACKAGE = Path(__file__).parents[2]
_MODULE = "cimjax_config_file"


class ConfigError(ValueError):
    """A config that cannot be read, or a field that cannot be set: one line that says where and what."""


class Override(NamedTuple):
    """One `--config.field=value`: the dotted field, and the value as typed; None where only the field was typed."""

    field: str
    text: str | None

    def __str__(self) -> str:
        return f"--config.{self.field}" + ("" if self.text is None else f"={self.text}")

    @property
    def shown(self) -> str:
        """It as typed, in a message."""
        return shortened(str(self))


def take_overrides(argv: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Every `--config.field=value` or `--config.field value` of a command line, and what is left of it."""
    overrides, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        field, equals, text = word.removeprefix("--config.").partition("=")
        value = text if equals else words.pop(0) if words and not words[0].startswith("--") else None
        overrides.append(Override(field, value))
    return overrides, rest


def load_config(argument: str, overrides: Sequence[Override] = ()) -> ConfigDict:
    """The config of a file, with its options and overrides, locked; every field is there and checked.

    Args:
      argument: `FILE` or `FILE:options`; a file that ends in `.json` is read as one, without options.
      overrides: applied in their order, after the options.

    Raises:
      OptionError: where the options are refused by the config.
      ConfigError: for everything else that is wrong in the file or in an override.
      ValueError: for a field that `cimjax.training.config.fields` refuses.
    """
    name, colon, options = argument.partition(":")
    path = Path(os.path.expanduser(name))
    source = _source(path)
    if path.suffix == ".json":
        if colon:
            raise ConfigError(f"{path} has no options, which belong to a Python file; set its fields instead.")
        config = completed(_json(path, source))
    else:
        config = _call(path, source, (options,) if colon else ())
        if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
            raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}; return a ConfigDict.")
        completed(config.to_dict())  # what is wrong with the file itself
    return completed(_overridden(config, overrides)).lock()


def _json(path: Path, source: bytes) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error


def _source(path: Path) -> bytes:
    """The text of a config file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        known = [*_files(Path("configs")), *_files(path)]
        near = {file.stem: file for file in [*known, *_files(path.parent)]}
        if match := closest(path.stem, near):
            hint = f" (did you mean {near[match]}?)"
        else:
            hint = f" (known: {', '.join(map(str, dict.fromkeys(known)))})" if known else ""
        raise ConfigError(f"there is no config file {str(path)!r}{hint}.") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}.") from error


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))


def _call(path: Path, source: bytes, options: tuple[str, ...]) -> Any:
    """What `get_config` of a file returns."""
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module  # dataclasses, and so Flax modules, look up the module that they are defined in
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        if callable(get_config := getattr(module, "get_config", None)):
            return get_config(*options)
    except OptionError:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place, reason = ":".join(map(str, [path, *lines[-1:]])), str(error)
        if isinstance(error, SyntaxError):
            place, reason = f"{error.filename or path}:{error.lineno}", error.msg
        raise ConfigError(f"{place}: {type(error).__name__}: {reason}") from error
    raise ConfigError(f"{path} has no function get_config(options), which returns a ConfigDict.")


def _is_ours(error: Exception) -> bool:
    """Whether a function of cimjax that the file called broke; the ValueErrors of cimjax are about their arguments."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return not isinstance(error, ValueError) and file != Path(__file__) and file.is_relative_to(_PACKAGE)


def _overridden(config: ConfigDict, overrides: Sequence[Override]) -> dict[str, Any]:
    """The plain fields of a config after overrides; what belongs together in a specification may come in any order."""
    plain = {"spec": config.to_dict()["spec"]}
    with config.unlocked(), config.ignore_type():
        for override in overrides:
            *groups, last = override.field.split(".")
            in_spec = override.field.split(".")[0] == "spec"
            field = None if in_spec else field_of(override.field)
            holder: Any = _inside(plain, override, groups) if in_spec else config
            for group in () if in_spec else groups:
                if group not in holder:
                    holder[group] = ConfigDict()
                holder = holder[group]
            old = holder.get(last, field and field.default)
            if override.text is None and not isinstance(old, bool):
                raise ConfigError(f"{override}: give a value, as in {override}=VALUE.")
            as_text = field is not None and (isinstance(old, str) or field.kind is TEXT)
            value = override.text if as_text else _literal(override.text)
            holder[last] = field.read(value) if field else value
    return config.to_dict() | plain


def _inside(plain: dict[str, Any], override: Override, groups: Sequence[str]) -> dict[str, Any]:
    """The group of the specification that holds a field."""
    tree: Any = plain
    for depth, name in enumerate(override.field.split(".")):
        above = ".".join(["config", *groups[:depth]])
        if tree is None:
            raise ConfigError(
                f"{override.shown}: {above} is None here, so nothing in it can be set; give other options after the "
                f"file, or the whole of it, as in --{above}=\"{{'{name}': VALUE}}\"."
            )
        if not isinstance(tree, dict) or name not in tree:
            hint = nearest(name, tree) if isinstance(tree, dict) else ""
            raise ConfigError(f"unknown field config.{shortened(override.field)}{hint}.")
        if depth < len(groups):
            if tree[name] is None and name == "variation":  # setting a field of it switches it on
                tree[name] = VariationSpec(sigma=0).to_dict() | {"sigma": None}
            tree = tree[name]
    return tree


def _literal(text: str | None) -> Any:
    """A Python literal, `true`, `false` or `none`; anything else is a name. A field alone is True."""
    if text is None or text.lower() in ("true", "false", "none"):
        return {None: True, "true": True, "false": False, "none": None}[text and text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd literals, which are names then
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
