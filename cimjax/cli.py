"""The command line, `cimjax COMMAND`: reads what was typed, calls the room that does it, prints what comes back.

A command imports its room when it runs, so that help and mistakes are answered at once. What a user can get wrong ends
in one line and exit code 2; a mistake of cimjax itself keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import textwrap
from typing import Any, NoReturn

import cimjax
from cimjax.analysis.commands import COMMANDS as ANALYSIS
from cimjax.command import A_CONFIG, UsageError, is_for_the_user
from cimjax.spec.base import closest, nearest, shortened, shown
from cimjax.training.commands import COMMANDS as TRAINING


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a mistake in what was asked for, 130 when interrupted, or 141 when
    nobody reads what is printed any more."""
    try:
        _dispatch(sys.argv[1:] if argv is None else list(argv))
        print(end="", flush=True)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still prints at its end
        return 141
    except ValueError as error:
        if not is_for_the_user(error):
            raise
        print("cimjax:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("cimjax:", str(stop) or "interrupted", file=sys.stderr)
        return 130


def start(argv: list[str] | None = None) -> int:
    """`main` as a process of its own, which may replace itself to have its memory in large pages."""
    from cimjax.large_pages import start_again_with_large_pages
    from cimjax.training.run.files import show_in_one_line

    words = sys.argv[1:] if argv is None else argv
    show_in_one_line()
    if words and words[0] in ("train", "evaluate", "bench", "tune"):
        start_again_with_large_pages()
    code = main(words)
    # All is done; what libraries do at the end is not to be interrupted with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


_COMMANDS = {**TRAINING, **ANALYSIS}

_ON_CONFIGS = """\
A config file is Python, and is executed: take it from those whom you trust. One
that ends in .json is only read.

options of every config, after a colon and separated by commas:
{}

fields of every config, set by --config.FIELD=VALUE, with what they usually are:

{}

"""
_SEE_TRAIN = "options and fields of configs: cimjax train --help\n\n"


class _Parser(argparse.ArgumentParser):
    """The arguments of one command; raises instead of printing and leaving."""

    def __init__(self, name: str) -> None:
        command = _COMMANDS[name]
        self.takes_config = any(settings.get("metavar") == A_CONFIG for settings in command.arguments.values())
        super().__init__(
            prog=f"cimjax {name}",
            description=textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 80),
            epilog=f"{_SEE_TRAIN if self.takes_config else ''}example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.example, self.flags = command.example, ["--help", "-h"]
        self.takes_rest = command.takes_rest
        for argument, settings in command.arguments.items():
            self.add_argument(argument, **settings)
            self.flags += [argument] if argument.startswith("-") else []

    def format_help(self) -> str:
        """What `--help` prints; that of `train` explains configs."""
        if self.prog == "cimjax train":
            from cimjax.training.config.describe import describe_fields, describe_options

            on_configs = _ON_CONFIGS.format(describe_options(), describe_fields())
            self.epilog = f"{on_configs}example:\n  {self.example}"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; for example: {self.example}")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """What was typed, or one line about the first thing that is wrong with it."""
        overrides: list[Any] = []
        rest: list[str] = []
        if self.takes_rest and "--" in argv:
            place = argv.index("--")
            argv, rest = argv[:place], argv[place + 1 :]
        if self.takes_config:
            from cimjax.training.config.file import take_overrides

            overrides, argv = take_overrides(argv)
            if "--config" in self.flags and argv and ".py" in argv[0] and not argv[0].startswith("-"):
                raise UsageError(f"unexpected argument {argv[0]!r}; did you mean --config {shlex.quote(argv[0])}?")
        for word in argv:
            if word.startswith("-") and word.partition("=")[0] not in self.flags:
                raise UsageError(f"{_about_flag(word, self.flags, self.takes_config)}; see {self.prog} --help.")
        arguments, unexpected = self.parse_known_args(argv)
        if unexpected:
            self.error(f"unexpected argument {shortened(unexpected[0])!r}")
        arguments.overrides, arguments.rest = overrides, rest
        return arguments


def _dispatch(argv: list[str]) -> None:
    if not argv:
        raise UsageError(f"give a command: {', '.join(_COMMANDS)}; see cimjax --help.")
    if argv[0] in ("-h", "--help"):
        return print(_help(""))
    if argv == ["--version"]:
        return print(f"cimjax {cimjax.__version__}")
    group = [name for name in _COMMANDS if name.startswith(f"{argv[0]} ")]
    if group and argv[1:2] in (["-h"], ["--help"]):
        return print(_help(f"{argv[0]} "))
    if group and len(argv) == 1:
        raise UsageError(f"give a command: {', '.join(group)}; see cimjax {argv[0]} --help.")
    words = 2 if group else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in _COMMANDS:
        raise UsageError(f"unknown command {shown(name)}{nearest(name, _COMMANDS)}; see cimjax --help.")
    parser = _Parser(name)
    if {"-h", "--help"} & set(rest):
        return print(parser.format_help().rstrip())
    _COMMANDS[name].run(parser.parse(rest))


def _about_flag(word: str, flags: list[str], takes_config: bool) -> str:
    """What was meant by a flag that there is not."""
    from cimjax.training.config.fields import FIELDS
    from cimjax.training.config.options import CIM_OPTIONS

    name, _, value = shortened(word).lstrip("-").partition("=")
    typed = f"{name}={value or 'VALUE'}"
    if takes_config and name in {option.name for option in CIM_OPTIONS}:
        flag = "--config " if "--config" in flags else ""
        return f"unknown flag --{name}: options follow the file, {flag}FILE:{shlex.quote(typed)}"
    if takes_config and (name in FIELDS or closest(f"--{name}", flags) is None):
        return f"unknown flag --{name}: a field of the config is set by --config.{shlex.quote(typed)}"
    return f"unknown flag --{name}{nearest(f'--{name}', flags)}"


def _help(group: str) -> str:
    """What `--help` prints of all commands, or of those of a group."""
    lines = [] if group else ["Train networks for compute-in-memory chips.", ""]
    for name, command in _COMMANDS.items():
        if name.startswith(group):
            about = textwrap.fill(command.help, 80, initial_indent="    ", subsequent_indent="    ")
            lines += [f"cimjax {name}", about, f"    {command.example}", ""]
    return "\n".join([*lines, "cimjax COMMAND --help explains a command; cimjax --version prints the version."])
