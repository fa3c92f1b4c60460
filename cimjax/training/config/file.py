"""From `--config FILE[:options]` and `--config.field=value` to a locked `ConfigDict`; every mistake is one line.

A config file is Python with a function `get_config(options)`. Overrides are typed by the value that they replace,
except below `spec`, where `CIMSpec` decides: a whole number there may become 1.5, and anything may become None or stop
being it. (The flags of `ml_collections` refuse that, and end in a traceback where a name or a file is wrong.) jax is
not imported here, so that a mistake is answered at once.
"""

from __future__ import annotations

import ast
import math
import sys
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from cimjax.spec import CIMSpec
from cimjax.spec.base import LARGEST_COUNT, closest, nearest, shortened, shown
from cimjax.training.config.options import OptionError

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
    """The config of a file, with its options and overrides, locked.

    Args:
      argument: `FILE` or `FILE:options`.
      overrides: applied in their order, after the options.

    Raises:
      OptionError: where the options are refused by the config.
      ConfigError: for everything else that is wrong in the file, in its specification or in an override.
    """
    name, colon, options = argument.partition(":")
    path = Path(name).expanduser()
    config = _call(path, _source(path), (options,) if colon else ())
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}; return a ConfigDict.")
    _override(config, overrides)
    return config.lock()


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


def _override(config: ConfigDict, overrides: Sequence[Override]) -> None:
    """Set fields; then the specification is built once, so that what belongs together may come in any order."""
    spec = config.get("spec")
    plain = {"spec": spec.to_dict() if isinstance(spec, ConfigDict) else spec}
    for override in overrides:
        in_spec = "spec" in config and override.field.split(".")[0] == "spec"
        tree = plain if in_spec else config
        holder, name = _find(override, tree, config)
        old = holder[name]
        if isinstance(old, ConfigDict):
            raise ConfigError(f"{override.shown}: this is a group of fields ({', '.join(old)}); set one of them.")
        try:
            holder[name] = _literal(override.text) if in_spec or old is None else _typed(override.text, type(old))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{override.shown}: {error}.") from None
    if plain["spec"] is not None:
        try:
            config.spec = ConfigDict(CIMSpec.from_dict(plain["spec"]).to_dict())
        except ValueError as error:
            raise ConfigError(f"{_culprits(overrides, str(error))}: {error}") from error
    elif "spec" in config:
        config.spec = None


def _find(override: Override, tree: Any, config: ConfigDict) -> tuple[Any, str]:
    """The group that holds a field, and the field's name in it."""
    *groups, name = override.field.split(".")
    for depth, group in enumerate([*groups, name]):
        above = ".".join(["config", *groups[:depth]])
        if tree is None:
            raise ConfigError(
                f"{override.shown}: {above} is None here, so nothing in it can be set; give other options after the "
                f"file, or the whole of it, as in --{above}=\"{{'{group}': VALUE}}\"."
            )
        if not isinstance(tree, ConfigDict | dict) or group not in tree:
            raise ConfigError(
                f"unknown field --config.{shortened(override.field)}{_hint(override.field, config, tree)}."
            )
        if depth < len(groups):
            tree = tree[group]
    return tree, name


def _hint(field: str, config: ConfigDict, group: Any) -> str:
    """The field that was meant: one of the same last name, or the nearest; otherwise what there is."""
    known = list(_dotted(config))
    last = field.rpartition(".")[2]
    match = next((name for name in known if name.rpartition(".")[2] == last), None) or closest(field, known)
    if match:
        return f" (did you mean --config.{match}?)"
    return nearest(last, group if isinstance(group, ConfigDict | dict) else config)


def _dotted(config: ConfigDict, above: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield above + name
        if isinstance(value, ConfigDict):
            yield from _dotted(value, f"{above}{name}.")


def _typed(text: str | None, kind: type) -> Any:
    """The value of a text that replaces a value of type `kind`."""
    if kind is bool and text is None:
        return True
    if text is None:
        raise ValueError("give a value, as in --config.field=value")
    if kind is str:
        return text
    words = {bool: "true or false", int: "a whole number", float: "a finite number", tuple: "a tuple", list: "a list"}
    if kind not in words:
        raise ValueError(f"a field of type {kind.__name__} cannot be set on the command line; set it in the config")
    value = _literal(text)
    if type(value) is int and abs(value) > LARGEST_COUNT:
        raise ValueError(f"got {shown(text)}, but this field takes no number beyond {LARGEST_COUNT}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"got {shown(text)}, but this field takes {words[kind]}")
    return value


def _literal(text: str | None) -> Any:
    """A Python literal, `true`, `false` or `none`; anything else is a name. A field alone is True."""
    if text is None or text.lower() in ("true", "false", "none"):
        return {None: True, "true": True, "false": False, "none": None}[text and text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd literals, which are names then
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _culprits(overrides: Sequence[Override], message: str) -> str:
    """The overrides that a refusal by `CIMSpec` is about, as typed."""
    inside = [override for override in overrides if override.field.split(".")[0] == "spec"]
    named = [override for override in inside if f"`{override.field.rpartition('.')[2]}`" in message]
    return " ".join(override.shown for override in named or inside) or "`spec` of the config"
