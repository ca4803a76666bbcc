"""Recipes: which rule decides, and files that are none."""

from pathlib import Path

import pytest

from quantize.errors import GemmaError
from quantize.recipe import RECIPES, Rule, choose, rules_of


def formats(rules: list[Rule], *names: str) -> list[str]:
    return [choose(rules, name).format for name in names]


NAMES = ("embed", "layers.0.attn_v", "layers.12.ffn_down", "layers.3.attn_q")


@pytest.mark.parametrize(
    ("recipe", "bits", "expected"),
    [
        ("default", 4, ["int8_planes", "int4_dq", "int4_dq", "int4_dq"]),
        ("small", 4, ["int4_dq"] * 4),
        ("quality", 4, ["int8_planes", "int8", "int8", "int4_dq"]),
        ("small", 8, ["int8_planes", "int8", "int8", "int8"]),
        ("quality", 16, ["bf16"] * 4),
        ("default", 32, ["f32"] * 4),
    ],
)
def test_named_recipes(recipe: str, bits: int, expected: list[str]) -> None:
    assert recipe in RECIPES
    assert formats(rules_of(recipe, bits, 32), *NAMES) == expected


def test_in_a_file_the_first_pattern_that_matches_decides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[formats]\n"
        '"layers.0.*" = "bf16"\n'
        '"layers.*.attn_v" = { format = "int8", group_size = 128 }\n'
        '"embed" = "int8"\n'
    )
    rules = rules_of(str(path), 4, 64)
    assert formats(rules, *NAMES) == ["int8_planes", "bf16", "int4_dq", "int4_dq"]
    assert choose(rules, "layers.1.attn_v") == ("layers.*.attn_v", "int8", 128)
    assert choose(rules, "layers.1.attn_q").group_size == 64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"embed" = "int8"', r"one table, \[formats\]"),
        ("[formats]\n[other]", r"one table, \[formats\]"),
        ("formats = 3", r"one table, \[formats\]"),
        ('[formats]\n"*" = "int3"', r"'\*' no format"),
        ('[formats]\n"*" = 4', r"'\*' no format"),
        ('[formats]\n"*" = "int8_planes"', r"'\*' no format"),
        ('[formats]\n"*" = "int4_dq"', r"'\*' no format"),
        ('[formats]\n"*" = { format = "int4" }', r"'\*' no format"),
        ('[formats]\n"*" = { format = "int4", group_size = 48 }', r"'\*' no format"),
        ('[formats]\n"*" = { format = "int4", group_size = 32, x = 1 }', r"'\*' no format"),
        ("[formats", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(GemmaError, match=f"{path} .*{reason}"):
        rules_of(str(path), 4, 32)


def test_a_recipe_that_is_not_there_is_refused() -> None:
    with pytest.raises(GemmaError, match="tiny is no recipe: choose default, small, quality"):
        rules_of("tiny", 4, 32)
