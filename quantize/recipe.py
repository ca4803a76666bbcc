"""Which tensor gets how many bits.

A recipe is a list of rules; the first whose pattern matches a matrix's name decides. It has a name,
or is a TOML file of one's own:

    [formats]                       # names as `gemma-cli inspect --tensors` shows them
    "embed" = "int8"
    "layers.[0-3].*" = "int8"
    "layers.*.ffn_down" = { format = "int4", group_size = 64 }
    "*" = "int4"
"""

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from quantize.errors import GemmaError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT_OF_BITS = {4: "int4", 8: "int8", 16: "bf16", 32: "f32"}
GROUP_SIZES = (32, 64, 128)
_LARGEST_FILE = 100_000
_MOST_DOTS = 100  # of a key; tomllib takes the square of their number in time and memory

RECIPES = {
    "default": {"embed": "int8"},
    "small": {},
    "quality": {"embed": "int8", "layers.*.attn_v": "int8", "layers.*.ffn_down": "int8"},
}
"""What differs from int4 when 4 bits are asked for.

The embedding is also the output head, and in a small Gemma its precision matters (llama.cpp, issue
5650). Errors in attention values and in what a feed-forward block gives reach the residual stream
with no softmax or gate between.
"""

METHODS = ("rtn", "search", "gptq")
"""How int4 weights are rounded: to the nearest step of Q4_0's scale, with a codebook and scales
that are searched, or in such a way that later inputs make up for the errors of earlier ones."""


class Rule(NamedTuple):
    pattern: str
    format: str
    group_size: int


def rules_of(recipe: str, bits: int, group_size: int) -> list[Rule]:
    """The rules of a recipe: one of RECIPES, which matter for 4 bits, or the path of a TOML file.

    bits: 4, 8, 16 or 32; they and the group size (of GROUP_SIZES) count where a recipe does not say
    otherwise. Raises GemmaError if the file cannot be used.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}")
    if recipe in RECIPES:
        special = RECIPES[recipe] if bits == 4 else {}
        rules = [Rule(pattern, fmt, group_size) for pattern, fmt in special.items()]
    else:
        rules = _read_rules(Path(recipe), group_size)
    return [*rules, Rule("*", FORMAT_OF_BITS[bits], group_size)]


def choose(rules: Sequence[Rule], name: str) -> Rule:
    """The rule for a matrix. An embedding of 8 bits lies in planes, since the first is mostly
    enough to find the likeliest token. Beside weights of 4 bits, scales have 8."""
    rule = next(rule for rule in rules if fnmatchcase(name, rule.pattern))
    if name == "embed" and rule.format == "int8":
        return rule._replace(format="int8_planes")
    return rule._replace(format="int4_dq") if rule.format == "int4" else rule


def _read_rules(path: Path, group_size: int) -> list[Rule]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE} bytes")
        if max(line.count(b".") for line in [*text.splitlines(), b""]) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        table = tomllib.loads(text.decode())
    except OSError as error:
        raise GemmaError(
            f"{path} is no recipe: choose {', '.join(RECIPES)}, or a TOML file that can be read."
        ) from error
    except (ValueError, RecursionError) as error:
        raise GemmaError(f"{path} is not valid TOML ({error!s:.200}); correct it.") from error
    formats = table.pop("formats", None)
    if table or not isinstance(formats, dict):
        raise GemmaError(
            f"{path} must hold one table, [formats], with a format for each pattern of names; "
            "see `gemma-cli quantize --help`."
        )
    return [_read_rule(path, pattern, choice, group_size) for pattern, choice in formats.items()]


def _read_rule(path: Path, pattern: str, choice: object, group_size: int) -> Rule:
    match choice:
        case str(fmt):
            size: object = group_size
        case {"format": str(fmt), "group_size": size, **rest} if not rest:
            pass
        case _:
            fmt, size = "", 0
    if fmt not in FORMAT_OF_BITS.values() or type(size) is not int or size not in GROUP_SIZES:
        raise GemmaError(
            f"{path} gives {shown(pattern)} no format that there is; write one of "
            f"{', '.join(FORMAT_OF_BITS.values())}, or {{ format = …, group_size = … }} with "
            f"groups of {', '.join(map(str, GROUP_SIZES))}."
        )
    return Rule(pattern, fmt, size)
