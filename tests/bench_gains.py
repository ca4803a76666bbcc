"""Measure gemma-cli beside itself, in turn in one process, and print a table in Markdown: what long
contexts, batches and drafts do to its speed, the memory it takes and the time it compiles.

Not a test. Ratios are those of neighbouring measurements, so that a machine whose speed changes
does not decide:

    make bench-gains ARGS='-m FILE'
    make bench-gains ARGS='-m FILE --only batch --rounds 9'

With a text it also shows, for so many of its positions, that the largest logits, for which not all
of the output head is read, are those of the whole head:

    make bench-gains ARGS='-m FILE --only head --text wiki.test.raw'

What drafts gain depends on the text, and so on a model that has learned some: not one with random
weights.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from gemma_cli.generation import generate
from gemma_cli.runtime import KVCache, Model
from gemma_cli.sampling import Sampler, Sampling
from gemma_cli.text.tokenizer import Tokenizer
from quantize.modelfile import ModelFile

Speed = Callable[[], float]
"""Measures once: tokens in a second."""

DECODED = 32
BATCH = 8
POSITIONS = 20_440
"""Of a text, in 40 windows of 511."""

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hans", "ida", "jonas")
# To be gone on with: each entry repeats the one before, but for some words.
REPEATING = "\n".join(
    f'  {{"id": {i}, "name": "{name}", "active": true, "groups": ["users", "readers"], '
    f'"home": "/home/{name}", "shell": "/bin/bash", "quota_megabytes": {1000 + 24 * i}}},'
    for i, name in enumerate(NAMES)
)
UNRELATED = "The lighthouse keeper closed the door behind him. That night, for the first time,"


class Bench:
    """A model and what it is measured with."""

    def __init__(self, path: Path) -> None:
        self.file = ModelFile.open(path)
        self.model = Model(self.file)
        self._rng = np.random.default_rng(0)

    def ids(self, n: int) -> list[int]:
        return self._rng.integers(3, self.file.config.vocab_size, n).tolist()

    def filled(self, depth: int) -> KVCache:
        cache = self.model.new_cache(depth + 64 + DECODED)
        self.model.forward(self.ids(depth + 1), cache, n_best=1)
        return cache

    def prefill(self, n: int) -> Speed:
        def measure() -> float:
            ids, cache = self.ids(n), self.model.new_cache(n)
            began = perf_counter()
            self.model.forward(ids, cache, n_best=1)
            return n / (perf_counter() - began)

        return measure

    def decode(self, n_sequences: int, depth: int = 32) -> Speed:
        caches = [self.filled(depth) for _ in range(n_sequences)]

        def measure() -> float:
            for cache in caches:
                cache.truncate(depth + 1)
            # Greedily, since the output head's work depends on how sure the model is.
            runs = [self.ids(1) for _ in caches]
            began = perf_counter()
            for _ in range(DECODED):
                logits = self.model.forward_batch(runs, caches, n_best=1)
                runs = logits.argmax(1)[:, None].tolist()
            return n_sequences * DECODED / (perf_counter() - began)

        return measure

    def answer(self, text: str, sampling: Sampling, *, draft: bool) -> Speed:
        ids = [2, *Tokenizer(self.file.tokenizer_model).encode(text)]

        def measure() -> float:
            cache = self.model.new_cache(len(ids) + 257)
            answer = generate(
                self.model, cache, ids, Sampler(sampling), frozenset(), max_tokens=257, draft=draft
            )
            next(answer)
            began = perf_counter()
            n = sum(1 for _ in answer)
            return n / (perf_counter() - began)

        return measure


def rows(bench: Bench) -> Iterator[tuple[str, str, Callable[[], tuple[Speed, Speed]]]]:
    """What is compared: a key, a line about it, and what makes the two measurements."""
    deep = min(8000, bench.file.config.context_length - 100)
    greedy, drawn = Sampling(temperature=0), Sampling(seed=1)
    yield (
        "prefill",
        "prefill of 4,096 tokens, of 512",
        lambda: (bench.prefill(4096), bench.prefill(512)),
    )
    yield (
        "depth",
        f"decode after {deep:,} tokens, after 32",
        lambda: (bench.decode(1, deep), bench.decode(1)),
    )
    yield (
        "batch",
        f"decode {BATCH} sequences, one",
        lambda: (bench.decode(BATCH), bench.decode(1)),
    )
    for key, about, text, sampling in (
        ("repeating", "a text that repeats itself", REPEATING, greedy),
        ("unrelated", "one that does not", UNRELATED, drawn),
    ):
        yield (
            key,
            f"{about}, drafts or none",
            lambda text=text, sampling=sampling: (
                bench.answer(text, sampling, draft=True),
                bench.answer(text, sampling, draft=False),
            ),
        )


def compare(first: Speed, second: Speed, rounds: int) -> str:
    """Medians of both, and of the ratios of each round with its extremes."""
    first(), second()  # untimed: what they read stays in caches
    turns = [(first(), second()) if i % 2 else (second(), first())[::-1] for i in range(rounds)]
    ratios = [one / other for one, other in turns]
    one, other = (statistics.median(column) for column in zip(*turns, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{one:.1f} | {other:.1f} | {spread}"


def compare_heads(bench: Bench, text: str) -> str:
    """How many positions of a text have other largest logits if not all of the head is read."""
    ids = Tokenizer(bench.file.tokenizer_model).encode(text[: 20 * POSITIONS])[:POSITIONS]
    wrong, read = dict.fromkeys((1, 8, 64), 0), dict.fromkeys((1, 8, 64), 0.0)
    cache = bench.model.new_cache(512)
    for i, token in enumerate(ids):
        if i % 511 == 0:
            cache.clear()
            bench.model.forward([2], cache)
        position = cache.length
        whole = bench.model.forward([token], cache)
        largest = np.sort(np.partition(whole, -64)[-64:])
        for n_best in wrong:
            cache.truncate(position)
            part = bench.model.forward([token], cache, n_best=n_best)
            known = np.isfinite(part)
            same = np.array_equal(part[known], whole[known])
            same &= np.array_equal(np.sort(part[known])[-n_best:], largest[-n_best:])
            same &= n_best > 1 or part.argmax() == whole.argmax()
            wrong[n_best] += not same
            read[n_best] += known.mean() / len(ids)
    shares = ", ".join(f"{n} largest {wrong[n]} ({read[n]:.2%})" for n in wrong)
    return f"{shares}, of {len(ids):,} positions (of all logits, those known in the end)"


def anonymous_memory(path: Path) -> str:
    """MB that a process has that fills a context of 2,048 tokens, its KV cache left out."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from gemma_cli.runtime import Model\n"
        "from quantize.modelfile import ModelFile\n"
        "model = Model(ModelFile.open(Path(sys.argv[1])))\n"
        "cache = model.new_cache(2048)\n"
        "model.forward(list(range(3, 2043)), cache, n_best=64)\n"
        "for _ in range(8): model.forward([3], cache, n_best=64)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(re.search(r'RssAnon:\\s*(\\d+)', status)[1]) * 1024 - cache.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    return f"{int(done.stdout) / 1e6:.0f} MB"


def compilation(path: Path) -> str:
    """Seconds until the first token of a process that finds no kernels, and of the next one."""
    seconds = []
    with tempfile.TemporaryDirectory() as home:
        for _ in range(2):
            began = perf_counter()
            subprocess.run(
                [sys.executable, "-m", "gemma_cli", "run", "-m", path, "-n", "1", "--raw", "Hello"],
                env=os.environ | {"GEMMA_CLI_HOME": home},
                capture_output=True,
                check=True,
            )
            seconds.append(perf_counter() - began)
    return f"{seconds[0]:.1f} s, then {seconds[1]:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench-gains", description="Measure gemma-cli beside itself."
    )
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--only", action="append", metavar="KEY", help="of a row; repeatable")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for the key head")
    options = parser.parse_args()
    bench = Bench(options.model)
    print("| | tokens/s | tokens/s | ratio |\n|---|---|---|---|")
    for key, about, make in rows(bench):
        if not options.only or key in options.only:
            print(f"| {about} | {compare(*make(), options.rounds)} |", flush=True)
    if options.text and (not options.only or "head" in options.only):
        text = options.text.read_text("utf-8")
        print(f"- where not all of the head is read, differences: {compare_heads(bench, text)}")
    if not options.only or "memory" in options.only:
        print(f"- memory besides mapped pages and KV cache: {anonymous_memory(options.model)}")
    if not options.only or "compilation" in options.only:
        print(f"- a process that compiles all kernels: {compilation(options.model)}")


if __name__ == "__main__":
    main()
