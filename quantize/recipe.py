"""Which tensor gets how many bits."""

FORMAT_OF_BITS = {4: "int4", 8: "int8", 16: "bf16", 32: "f32"}
GROUP_SIZES = (32, 64, 128)


RECIPES = ("default", "small")

METHODS = ("rtn", "search", "gptq")
"""How int4 weights are rounded: to the nearest step of Q4_0's scale, with a codebook and scales
that are searched, or in such a way that later inputs make up for the errors of earlier ones."""


def format_of(name: str, bits: int, recipe: str = "default") -> str:
    """The format of a matrix under a recipe for `bits` (4, 8, 16 or 32).

    With 4 bits the embedding keeps 8, but for the recipe "small": it is the output head, too, and
    in a small Gemma its precision matters (llama.cpp, issue 5650). Its 8 bits lie in two planes,
    since the first is mostly enough to find the likeliest tokens.
    """
    if name == "embed" and (bits == 8 or (bits == 4 and recipe == "default")):
        return "int8_planes"
    return FORMAT_OF_BITS[bits]
