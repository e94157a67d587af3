"""A frozen dataclass as a command line: its fields are flags and positional arguments."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import shutil
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from mnist_dist.errors import UserError, print_result

T = TypeVar("T")

_WIDTH = 80
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    metavar: str | None = None,
    unset: str | None = None,
    group: str | None = None,
) -> Any:
    """Declare a dataclass field that a flag sets: `run_dir` is `--run-dir` or `--run_dir`.

    Args:
        default: the value without the flag; a flag without one is required.
        help: its text in --help, to which the default is added.
        metavar: stands for the value in --help. None: chosen by the field's type.
        unset: what a default of None means, to be shown in its place.
        group: starts a group in --help, which the fields below join.
    """
    metadata = {"help": help, "metavar": metavar, "unset": unset, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def argument(default: Any = dataclasses.MISSING, *, help: str, metavar: str) -> Any:
    """Declare a dataclass field that a positional argument sets; a tuple takes one or more."""
    metadata = {"help": help, "metavar": metavar, "positional": True}
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(kind: type[T], argv: Sequence[str], program: str) -> T:
    """Read a command line as an instance of the dataclass `kind`.

    Args:
        kind: fields declared by `flag` and `argument`; the docstring is the description in --help.
        argv: without the program's name.
        program: the program's name in --help.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
        SystemExit: with code 0 after --help.
    """
    given = given_flags(kind, argv, program)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in given:
            raise UserError(f"{_name(field)} is missing; --help lists every flag")
    return kind(**given)


def given_flags(kind: type[Any], argv: Sequence[str], program: str) -> dict[str, Any]:
    """Read a command line as `parse_flags`, but return only the fields that it sets, by name."""
    parser = _build_parser(kind, program)
    namespace, unknown = parser.parse_known_intermixed_args(list(argv))
    if any(word.replace("_", "-").startswith("--local-rank") for word in unknown):
        parser.error(
            "--local-rank: given by python -m torch.distributed.launch; start with torchrun instead"
        )
    if unknown:
        suggestion = _closest([_name(field) for field in dataclasses.fields(kind)], unknown)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(namespace).items()
    }
    for field in dataclasses.fields(kind):  # as from a shell's variable that is not set
        value = given.get(field.name)
        if value == "" or (isinstance(value, tuple) and "" in value):
            parser.error(f"{_name(field)} '': must not be empty")
    return given


def check_value(kind: type[Any], name: str, value: Any) -> Any:
    """Return a value that was read from JSON as the field `name` of `kind` holds it.

    Raises:
        ValueError: the value has another type or is none of the choices; the text is the remedy.
    """
    base, optional = _split_optional(get_type_hints(kind)[name])
    if value is None and optional:
        return None
    if get_origin(base) is Literal:
        if value not in get_args(base):
            raise ValueError(f"use one of {', '.join(get_args(base))}")
        return value
    if base is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not base:
        raise ValueError(f"must be {_NAMES[base]}")
    if base is str and not _can_be_typed(value):
        raise ValueError("must be text without null characters and lone surrogates")
    return value


def _can_be_typed(text: str) -> bool:
    """Return whether a command line can hold the text, also as bytes that are not UTF-8."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.splitlines())}; --help lists every flag")

    def print_help(self, file: Any = None) -> None:
        print_result(self.format_help().rstrip())


def _build_parser(kind: type[Any], program: str) -> _Parser:
    fields, types = dataclasses.fields(kind), get_type_hints(kind)
    parser = _Parser(
        prog=program,
        usage=" ".join(["%(prog)s [FLAGS]", *filter(None, map(_usage, fields))]),
        description=inspect.getdoc(kind),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter,
            max_help_position=24,
            width=min(_WIDTH, shutil.get_terminal_size().columns),
        ),
        allow_abbrev=False,
    )
    group: argparse._ActionsContainer = parser
    for field in fields:
        if title := field.metadata.get("group"):
            group = parser.add_argument_group(title)
        _add(group, field, types[field.name])
    return parser


def _add(group: argparse._ActionsContainer, field: dataclasses.Field[Any], kind: Any) -> None:
    """Add one field. Its default is left to the dataclass, so that only given flags are set."""
    base, optional = _split_optional(kind)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": field.metadata["metavar"]}
    if get_origin(base) is Literal:
        options["choices"] = get_args(base)
    elif base is bool:
        options["action"] = argparse.BooleanOptionalAction
        del options["metavar"]
    elif get_origin(base) is tuple:
        options["nargs"] = "*"
    else:
        options["type"] = _reader(base, optional)
        options["metavar"] = options["metavar"] or _METAVARS[base]
    text = f"{field.metadata['help']} {_default(field)}".replace("%", "%%")
    if field.metadata.get("positional"):
        group.add_argument(field.name, help=text, **{"nargs": "?"} | options)
        return
    group.add_argument(_name(field), dest=field.name, help=text, **options)
    if "_" in field.name:
        alias = f"--{field.name}"
        group.add_argument(alias, dest=field.name, help=argparse.SUPPRESS, **options)


def _split_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` to X and True, any other type to itself and False."""
    if get_origin(kind) is not UnionType:
        return kind, False
    (base,) = (member for member in get_args(kind) if member is not NoneType)
    return base, True


def _reader(base: type[Any], optional: bool) -> Callable[[str], Any]:
    """A function from a word of the command line to a value."""

    def read(text: str) -> Any:
        if optional and text == "None":  # unsets what a config file has set
            return None
        try:
            if base is not str and "_" in text:  # Python takes 1_0 for 10
                raise ValueError
            return base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_NAMES[base]}") from None

    return read


def _name(field: dataclasses.Field[Any]) -> str:
    """The field's name for the user: the flag, or the positional argument's metavar."""
    if field.metadata.get("positional"):
        return str(field.metadata["metavar"])
    return "--" + field.name.replace("_", "-")


def _usage(field: dataclasses.Field[Any]) -> str:
    name, required = _name(field), field.default is dataclasses.MISSING
    if not field.metadata.get("positional"):
        return f"{name} {field.name.upper()}" if required else ""
    name = f"{name} [{name} ...]" if get_origin(field.type) is tuple else name
    return name if required else f"[{name}]"


def _default(field: dataclasses.Field[Any]) -> str:
    match field.default:
        case dataclasses.MISSING:
            return "(required)"
        case None:
            return f"(default: {field.metadata['unset'] or 'none'})"
        case bool(value):
            return f"(default: {'on' if value else 'off'})"
        case value:
            return f"(default: {value})"


def _closest(known: Sequence[str], unknown: Sequence[str]) -> str:
    """The flags that were probably meant by unknown ones, as the end of a message."""
    typed = [word.partition("=")[0].replace("_", "-") for word in unknown if word[:2] == "--"]
    meant = [name for word in typed for name in difflib.get_close_matches(word, known, 1)]
    return f"; perhaps you meant {', '.join(meant)}" if meant else ""


_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


def check_device(device: str) -> None:
    """Raise UserError if `device` is not a valid value of --device."""
    if not _DEVICE.fullmatch(device):
        raise UserError(f"--device {device or repr(device)}: use auto, cpu, cuda or cuda:N")
