"""Which tensor gets how many bits."""

FORMAT_OF_BITS = {4: "int4", 8: "int8", 16: "bf16", 32: "f32"}
GROUP_SIZES = (32, 64, 128)


def format_of(name: str, bits: int) -> str:
    """The format of a matrix under the default recipe for `bits` (4, 8, 16 or 32).

    With 4 bits the embedding keeps 8: it is the output head, too, and in a small Gemma its
    precision matters (llama.cpp, issue 5650).
    """
    if bits == 4 and name == "embed":
        return "int8"
    return FORMAT_OF_BITS[bits]
