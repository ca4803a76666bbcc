"""gemma-cli config: defaults of options, which a file holds.

It is TOML. At its top stands what holds for every command that has such an option, in a command's
table what holds for that command:

    model = "gemma-3-1b-it-int4"
    threads = 4

    [chat]
    system = "Be terse."
    plain = true
"""

import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from gemma_cli.cli import options, output
from gemma_cli.models import config_path
from gemma_cli.session import Session
from quantize.errors import GemmaError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Defaults = dict[str, dict[str, Any]]
"""For each command its parameters' values, as Click takes them (`default_map`)."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def config(
    invocation: typer.Context,
    command: Annotated[
        str | None,
        typer.Argument(
            metavar="COMMAND",
            help="Show what holds for this command only.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[
        bool, typer.Option("--path", help="Print only where the configuration file belongs.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show the defaults of options, and where they come from.

    A file of TOML can hold them. Keys are the options' long names; at its top they hold for every
    command that has such an option, in a table [COMMAND] for that command. A session that goes on
    keeps the model, system text and settings that it has.

    An option given counts most, then an environment variable, then the file.

    Examples:

    $EDITOR "$(gemma-cli config --path)"

    gemma-cli config run

    gemma-cli config --json | jq .commands.run.temperature
    """
    file = config_path()
    if path:
        output.write(f"{file}\n")
        return
    root = invocation.find_root()
    commands = configurable(root)
    if command is not None and command not in commands:
        raise typer.BadParameter(
            f"{shown(command)} is no command that has defaults{_meant(command, commands)}.",
            param_hint="COMMAND",
        )
    root.default_map = read_defaults(root)
    chosen = {command: commands[command]} if command else commands
    found = {name: dict(in_force(root, name)) for name in chosen}
    if json:
        output.write_json({"path": str(file), "exists": file.is_file(), "commands": found})
        return
    output.write_table(as_rows(found))
    output.note(f"{file}" + ("" if file.is_file() else " is not there: nothing is set in it."))


def in_force(root: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each option of a command, its value if it is not given, and where that comes from."""
    command = configurable(root)[name]
    with command.make_context(name, [], parent=root, resilient_parsing=True) as context:
        for key, (parameter, negated) in _keys(command).items():
            if negated or (key != "json" and key in parameter.opts[1:]):
                continue
            value, source = parameter.consume_value(context, {})
            where = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file"}.get(
                source.name, "default"
            )
            about: dict[str, Any] = {"value": value, "from": where}
            if where == "environment":
                about["variable"] = parameter.envvar
            elif value is None and isinstance(parameter.show_default, str):
                about["default"] = parameter.show_default
            yield key, about


def as_rows(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """Options, one row for the commands in which an option is the same; the defaults come first,
    what the file holds last."""
    keys = {key: None for about in found.values() for key in about}
    rows = {}
    for key in keys:
        each = {name: about[key] for name, about in found.items() if key in about}
        for about in each.values():
            same = [name for name, other in each.items() if other == about]
            label = key if len(same) == len(each) else f"{','.join(same)}.{key}"
            where = " ".join([about["from"], about.get("variable", "")]).strip()
            rows[label] = (label, _text(about), where)
    order = {"default": 0, "environment": 1, "file": 2}
    ordered = sorted(rows.values(), key=lambda row: order[row[2].split()[0]])
    return [("option", "value", "from"), *ordered]


def _text(about: Mapping[str, Any]) -> str:
    value = about["value"]
    if value is None:
        return str(about.get("default", "-"))
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(", ".join(map(str, value if isinstance(value, list) else [value])).split())


def weaker_than(session: Session, invocation: typer.Context) -> set[str]:
    """The parameters of the running command that a session goes on without: what it has counts
    more than what the file holds."""
    if not session.turns:
        return set()
    sources = {name: invocation.get_parameter_source(name) for name in invocation.params}
    return {name for name, source in sources.items() if source and source.name == "DEFAULT_MAP"}


# The file


def configurable(root: Any) -> dict[str, Any]:
    """The commands that the file can hold defaults of."""
    return {
        name: command
        for name, command in root.command.commands.items()
        if not (command.hidden or hasattr(command, "commands") or name == "config")
        and _keys(command)
    }


def _keys(command: Any) -> dict[str, tuple[Any, bool]]:
    """The long names of a command's options, without their dashes; each with its parameter, and
    whether it means its contrary."""
    return {
        name.removeprefix("--"): (parameter, negated)
        for parameter in command.params
        if parameter.param_type_name == "option"
        for negated, names in ((False, parameter.opts), (True, parameter.secondary_opts))
        for name in names
        if name.startswith("--")
    }


def read_defaults(root: Any) -> Defaults:
    """What the file holds; nothing if there is none.

    Raises GemmaError, which names the key and what belongs there, if it cannot be used.
    """
    path = config_path()
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise GemmaError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise GemmaError(f"{path} is not valid TOML ({error!s:.200}); correct it.") from None
    commands = configurable(root)
    keys = {name: _keys(command) for name, command in commands.items()}
    defaults: Defaults = {name: {} for name in commands}
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    for key, value in table.items():
        if key in tables:
            continue
        having = [name for name in commands if key in keys[name]]
        if not having:
            known = {key for each in keys.values() for key in each}
            raise GemmaError(
                f"{path} has {shown(key)}, which is no option of any command"
                f"{_meant(key, known)}; `gemma-cli COMMAND --help` lists its options."
            )
        for name in having:
            defaults[name] |= _checked(root, name, keys[name][key], key, value, f"{path} has {key}")
    for name, values in tables.items():
        if name not in commands:
            raise GemmaError(
                f"{path} has the table {shown(name)}, which is no command that has defaults"
                f"{_meant(name, commands)}."
            )
        for key, value in values.items():
            if key not in keys[name]:
                raise GemmaError(
                    f"{path} has {shown(key)} in [{name}], which is no option of `gemma-cli {name}`"
                    f"{_meant(key, keys[name])}; `gemma-cli {name} --help` lists them."
                )
            where = f"{path} has, in [{name}], {key}"
            defaults[name] |= _checked(root, name, keys[name][key], key, value, where)
    return defaults


def _checked(
    root: Any, name: str, option: tuple[Any, bool], key: str, value: Any, where: str
) -> dict[str, Any]:
    """A value as a parameter takes it. Raises GemmaError if it is of the wrong kind or range."""
    parameter, negated = option
    command = configurable(root)[name]
    expected = _kind(command, parameter)
    values = value if parameter.multiple and isinstance(value, list) else [value]
    for each in values:
        right = isinstance(each, (int, float) if expected is float else expected)
        if not right or (isinstance(each, bool) and expected is not bool):
            several = ", or a list of them" if parameter.multiple else ""
            raise GemmaError(f"{where} = {shown(value)} where {KINDS[expected]}{several} belongs.")
    values = [str(Path(v).expanduser()) if str(v).startswith("~/") else v for v in values]
    made = values if parameter.multiple else values[0]
    if negated:
        made = not made
    try:
        parameter.process_value(root, made)
    except typer.BadParameter as error:
        reason = error.message.removeprefix("Value error, ").removesuffix(".")
        raise GemmaError(f"{where} = {shown(value)}: {reason}.") from None
    return {parameter.name: made}


def _kind(command: Any, parameter: Any) -> type:
    """What a parameter's values are in TOML."""
    annotation = get_type_hints(command.callback)[parameter.name]
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in KINDS]
    return kinds[0] if kinds else str


def _meant(word: str, known: Mapping[str, object] | set[str]) -> str:
    close = get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
