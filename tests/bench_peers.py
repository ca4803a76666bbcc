"""Measure gemma-cli beside llama.cpp, in turn on the same machine, and print a table in Markdown.

Not a test. It takes an hour or more and 10 GB of disk, most of it for Gemma 1's 2B shape with
random weights:

    make bench-peers
    make bench-peers ARGS='--only 270m --rounds 1'
    make bench-peers ARGS='--instructions avx2 --json figures.json'
    make bench-peers ARGS='--plot plots'

The environment variable LLAMA_CPP_BIN names a folder with llama-bench, llama-quantize and
llama-completion. Without it llama.cpp's source is fetched with pip, out of llama-cpp-python's, and
built with cmake and a C++ compiler. What is fetched, built and converted stays in `.bench`
(`--folder`) and is used again: delete it after a change of the model file's format.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np
from checkpoints import VOCABULARY, gguf_metadata, gguf_name

import gemma_cli
from gemma_cli import demo
from quantize.config import GemmaConfig
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.tensors import tensor_shapes

OURS = (sys.executable, "-m", "gemma_cli")
PROGRAMS = ("llama-bench", "llama-quantize", "llama-completion")
SIMD = ("AVX2", "FMA", "F16C", "BMI2")
AVX512 = ("AVX512", "AVX512_VNNI", "AVX512_VBMI")
# For each choice of instructions: ours (None: the best that there is) and llama.cpp's build.
INSTRUCTIONS: dict[str, tuple[str | None, list[str]]] = {
    "native": (None, ["-DGGML_NATIVE=ON"]),
    "avx512": ("avx512vnni", ["-DGGML_NATIVE=OFF", *(f"-DGGML_{x}=ON" for x in SIMD + AVX512)]),
    "avx2": ("avx2", ["-DGGML_NATIVE=OFF", *(f"-DGGML_{x}=ON" for x in SIMD)]),
}
PROMPT = "The capital of France is"  # five tokens
PROMPT_TOKENS, TOKENS = 512, 64
DEPTHS = (0, 512, 1024, 2048, 4096, 8000)
PREFILL, DECODE, START = "prefill, tokens/s", "decode, tokens/s", "start to first token, s"

GEMMA_2B = GemmaConfig(
    generation="gemma",
    vocab_size=256_000,
    hidden_size=2048,
    intermediate_size=16384,
    n_layers=18,
    n_heads=8,
    n_kv_heads=1,
    head_dim=256,
    context_length=8192,
    rms_norm_eps=1e-6,
    query_scale=256**-0.5,
    rope_base=10000.0,
    rope_scale=1.0,
    rope_local_base=10000.0,
    sliding_window=0,
    sliding_layers=(False,) * 18,
    attention_soft_cap=0.0,
    final_soft_cap=0.0,
)

T = TypeVar("T")
Turn = tuple[float, float]
"""What one round measured: ours, llama.cpp's."""
Figures = dict[tuple[str, str, str], list[Turn]]
"""The rounds of each row, by model, format and what was measured."""
Curves = dict[str, dict[str, dict[int, float]]]
"""For each plot and engine, tokens a second by depth or by threads."""


class Pair(NamedTuple):
    """A model as each engine's file."""

    model: str
    format: str
    ours: Path
    theirs: Path


def main() -> None:
    options = parse_options()
    try:
        compare(options)
    except GemmaError as error:
        sys.exit(f"bench-peers: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"bench-peers: {where}{error.strerror or error}.")
    except KeyboardInterrupt:
        sys.exit(130)


def parse_options() -> argparse.Namespace:
    n_cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="bench-peers", description="Measure gemma-cli beside llama.cpp."
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, default=n_cpus, metavar="N", help="default: all")
    parser.add_argument("--only", choices=("2b", "270m"), help="measure this model alone")
    parser.add_argument(
        "--instructions",
        choices=INSTRUCTIONS,
        default="native",
        help="what both engines may use; with LLAMA_CPP_BIN, what that build uses",
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="default: .bench")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the raw figures")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="instead of the table, plot the 2B's speed by depth and by threads",
    )
    options = parser.parse_args()
    if not 1 <= options.threads <= n_cpus:
        parser.error(f"--threads is {options.threads}; this machine has 1 to {n_cpus}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least one is needed")
    return options


def compare(options: argparse.Namespace) -> None:
    if options.plot and not find_spec("matplotlib"):
        raise GemmaError("Plots need matplotlib: run `pip install 'gemma-cli[plot]'`.")
    ours, _ = INSTRUCTIONS[options.instructions]
    if ours:
        os.environ["GEMMA_CLI_ISA"] = ours
    # They look at the environment when they are imported.
    from gemma_cli.measure.machine import cpu_name  # noqa: PLC0415
    from gemma_cli.runtime import isa  # noqa: PLC0415

    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    peer = find_peer(folder, options.instructions)
    if options.plot:
        curves = measure_curves(pairs_2b(folder, peer)[0], peer, options.threads, options.rounds)
        if options.json:
            options.json.write_text(json.dumps(curves, indent=1) + "\n")
        draw_curves(curves, options.plot)
        return

    pairs = pairs_2b(folder, peer) if options.only != "270m" else []
    pairs += pairs_270m(folder, peer) if options.only != "2b" else []
    started, before = perf_counter(), others_seconds()
    figures, bits, bandwidth = measure(pairs, peer, options.threads, options.rounds)
    others = (others_seconds() - before) / (perf_counter() - started) / (os.cpu_count() or 1)
    about = [
        f"gemma-cli {gemma_cli.__version__} (Numba {version('numba')}): {isa.NAME}",
        f"{peer_version(peer)}: {peer_instructions(peer, pairs[0].theirs)}",
        f"{cpu_name()}, {options.threads} threads, reads {spread(bandwidth)} GB/s",
        *(
            f"{pair.model} {pair.format}: {bits_of(pair.ours):.2f} bits a weight, "
            f"llama.cpp {bits[pair.theirs]:.2f}"
            for pair in pairs
        ),
        f"rounds: {options.rounds}, the engines in turn; medians (least to most), "
        "the ratio that of each round",
        f"share of the CPUs that other processes took meanwhile: {others:.0%}",
    ]
    print(table(figures), *(f"- {line}" for line in about), sep="\n")
    if options.json:
        raw = {"about": about, "read_gb_s": bandwidth, "rows": raw_rows(figures)}
        options.json.write_text(json.dumps(raw, indent=1) + "\n")


# llama.cpp


def find_peer(folder: Path, instructions: str, programs: Sequence[str] = PROGRAMS) -> Path:
    """The folder with llama.cpp's programs, which are built if need be."""
    if named := os.environ.get("LLAMA_CPP_BIN"):
        if missing := [name for name in programs if not shutil.which(name, path=named)]:
            raise GemmaError(f"LLAMA_CPP_BIN is {named}, which has no {', '.join(missing)}.")
        return Path(named).resolve()
    build = folder / f"llama.cpp-{instructions}"
    if not all(shutil.which(name, path=build / "bin") for name in programs):
        if not shutil.which("cmake"):
            raise GemmaError(
                "llama.cpp is built with cmake and a C++ compiler: install them, or name a folder "
                f"that has {', '.join(programs)} in LLAMA_CPP_BIN."
            )
        configure_peer(peer_source(folder), build, instructions)
        note("Building llama.cpp: ten minutes or more on a few cores.")
        jobs = str(os.cpu_count() or 1)
        run("cmake", "--build", build, "--parallel", jobs, "--target", *programs, shown=True)
    return build / "bin"


def peer_source(folder: Path) -> Path:
    """llama.cpp's source as llama-cpp-python carries it, guarded for GCC 12."""
    source = folder / "llama.cpp"
    if not source.exists():
        note("Fetching llama.cpp's source, 80 MB.")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            package = "llama-cpp-python"
            options = ("--quiet", "--no-deps", "--no-binary", package, "--dest", scratch)
            run(sys.executable, "-m", "pip", "download", *options, package)
            shutil.unpack_archive(next(Path(scratch).glob("*.tar.gz")), scratch)
            unpacked = next(Path(scratch).glob("*/vendor/llama.cpp"))
            for path in unpacked.glob("ggml/src/ggml-cpu/amx/*.cpp"):
                path.write_text(guard_tile_config(path.read_text()))
            unpacked.rename(source)
    return source


def guard_tile_config(source: str) -> str:
    """C++ whose stores to a tile configuration are done before it is loaded: GCC 12 takes them for
    dead and drops them."""
    return re.sub(
        r"^([ \t]*)(_tile_loadconfig\()",
        r'\1__asm__ volatile("" ::: "memory");\n\1\2',
        source,
        flags=re.MULTILINE,
    )


def configure_peer(source: Path, build: Path, instructions: str) -> None:
    _, choice = INSTRUCTIONS[instructions]
    # llama.cpp would take the commit of the checkout around its source for its own.
    os.environ["GIT_CEILING_DIRECTORIES"] = str(source.parent)
    off = ("LLAMA_CURL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "BUILD_SHARED_LIBS")
    flags = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off), *choice]
    run("cmake", "-S", source, "-B", build, *flags, shown=True)


def peer_version(peer: Path) -> str:
    """llama.cpp's version as its program says it, ggml's as the source that it was built from."""
    done = run(peer / "llama-bench", "--version")
    text = parse_version(done.stdout + done.stderr)
    try:
        cached = (peer.parent / "CMakeCache.txt").read_text()
        home = re.search(r"^CMAKE_HOME_DIRECTORY:\w+=(.*)$", cached, re.MULTILINE)
        ggml = (Path(home[1] if home else "") / "ggml" / "CMakeLists.txt").read_text()
    except OSError:
        return text
    return text + parse_ggml_version(ggml)


def parse_version(text: str) -> str:
    found = re.search(r"version: (.*)", text)
    return "llama.cpp" + (f" {found[1].replace(' (build 0, commit unknown)', '')}" if found else "")


def parse_ggml_version(cmake: str) -> str:
    """ ", ggml 1.2.3", or nothing."""
    numbers = dict(re.findall(r"set\(GGML_VERSION_(MAJOR|MINOR|PATCH) (\d+)\)", cmake))
    parts = [numbers.get(part) for part in ("MAJOR", "MINOR", "PATCH")]
    return f", ggml {'.'.join(filter(None, parts))}" if all(parts) else ""


def peer_instructions(peer: Path, model: Path) -> str:
    return parse_instructions(run(*start_theirs(peer, model, 1)).stderr)


def parse_instructions(log: str) -> str:
    """Of "system_info: … | CPU : SSE3 = 1 | AVX2 = 1 | …", what is 1."""
    found = re.search(r"system_info:.*CPU : (.*)", log)
    names = re.findall(r"(\w+) = 1", found[1]) if found else []
    return ", ".join(names) or "instructions unknown"


# Models


def pairs_2b(folder: Path, peer: Path) -> list[Pair]:
    """A checkpoint, as either engine makes 4 bits of it."""
    source = random_2b(folder)
    mixed = made(
        folder / "2b-q4_0-embed-q8_0.gguf",
        lambda path: requantize(peer, source, path, "Q4_0", "--token-embedding-type", "q8_0"),
    )
    pure = made(
        folder / "2b-q4_0.gguf", lambda path: requantize(peer, source, path, "Q4_0", "--pure")
    )
    ours = converted(source, "--bits", "4", to=folder / "2b-int4-embed-int8.safetensors")
    small = converted(source, "--recipe", "small", to=folder / "2b-int4.safetensors")
    return [
        Pair("2B", "int4, embedding int8 (Q4_0, Q8_0)", ours, mixed),
        Pair("2B", "int4 (Q4_0)", small, pure),
    ]


def pairs_270m(folder: Path, peer: Path) -> list[Pair]:
    note(demo.TERMS)
    source = demo.demo_checkpoint()
    eight = made(
        folder / "270m-q8_0.gguf",
        lambda path: requantize(peer, source, path, "Q8_0", "--allow-requantize"),
    )
    four = folder / "270m-q4_k_m.safetensors"
    return [
        Pair("270M", "int4 (Q4_K_M)", converted(source, "--bits", "4", to=four), source),
        Pair("270M", "int8 (Q8_0)", converted(eight, "--bits", "8"), eight),
    ]


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A file that `make` writes unless it is there, whole or not at all."""
    if not path.exists():
        part = path.with_name("part-" + path.name)
        part.unlink(missing_ok=True)
        make(part)
        part.rename(path)
    return path


def random_2b(folder: Path) -> Path:
    def write(path: Path) -> None:
        note("Making a random 2B, 5 GB: a few minutes.")
        write_random(path, GEMMA_2B)

    return made(folder / "2b-f16.gguf", write)


def write_random(path: Path, config: GemmaConfig) -> None:
    """A GGUF file in float16 with random weights, of which one tensor at a time is in memory."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(config)
    writer = gguf.GGUFWriter(path, config.generation)
    for key, value in (gguf_metadata(config) | vocabulary(config.vocab_size)).items():
        if key != "general.architecture":  # stated by the writer
            add = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }[type(value)]
            add(key, value)
    for name, shape in shapes.items():
        # llama.cpp wants norms in float32.
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(gguf_name(name), shape, dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        values = rng.standard_normal(shape, np.float32)
        values *= 0.02
        writer.write_tensor_data(values.astype(np.float16))
    writer.close()


def vocabulary(size: int) -> dict[str, object]:
    """The tests' one with enough pieces: llama.cpp wants as many as the embedding has rows."""
    tokens, types = VOCABULARY["tokenizer.ggml.tokens"], VOCABULARY["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    more = size - len(tokens)
    return VOCABULARY | {
        "tokenizer.ggml.tokens": tokens + [f"piece{i}" for i in range(more)],
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": types + [1] * more,
    }


def requantize(peer: Path, source: Path, path: Path, kind: str, *options: str) -> None:
    note(f"Writing {path.name.removeprefix('part-')}: up to a few minutes.")
    run(peer / "llama-quantize", *options, source, path, kind)


def converted(source: Path, *options: str, to: Path | None = None) -> Path:
    """Our file of a GGUF file, beside it or at `to`."""

    def convert(path: Path) -> None:
        note(f"Converting {source.name}: up to a minute.")
        run(*OURS, "quantize", source, *options, "-o", path)

    return made(to or source.with_suffix(".safetensors"), convert)


def bits_of(path: Path) -> float:
    return ModelFile.open(path).bits_per_weight


# Measuring


def measure(
    pairs: Sequence[Pair], peer: Path, threads: int, rounds: int
) -> tuple[Figures, dict[Path, float], list[float]]:
    """The figures, the bits a weight of each of llama.cpp's files, and the GB/s that were read."""
    figures: Figures = defaultdict(list)
    bits: dict[Path, float] = {}
    bandwidth: list[float] = []
    starters = [pair for pair in pairs if pair.model == "270M"][:1]
    for pair in starters:
        # Untimed: what this compiles and reads stays in caches.
        run(*start_ours(pair.ours, threads))
    for n in range(rounds):
        note(f"Round {n + 1} of {rounds}.")
        for pair in pairs:
            ours, theirs = in_turn(
                n,
                partial(bench_ours, pair.ours, threads),
                partial(bench_theirs, peer, pair.theirs, threads),
            )
            for what, row in (("prefill", PREFILL), ("decode", DECODE)):
                figures[pair.model, pair.format, row].append((ours[what], theirs[what]))
            bandwidth.append(ours["read_gb_s"])
            bits[pair.theirs] = theirs["bits"]
        for pair in starters:
            seconds = in_turn(
                n,
                partial(timed, start_ours(pair.ours, threads)),
                partial(timed, start_theirs(peer, pair.theirs, threads)),
            )
            figures[pair.model, pair.format, START].append(seconds)
    return figures, bits, bandwidth


def in_turn(n: int, ours: Callable[[], T], theirs: Callable[[], T]) -> tuple[T, T]:
    """What both return. The first one changes from round to round, so that what slows a machine
    down meets both alike."""
    if n % 2 == 0:
        return ours(), theirs()
    second = theirs()
    return ours(), second


def bench_ours(
    model: Path,
    threads: int,
    *,
    prompt: int = PROMPT_TOKENS,
    depth: int = 0,
    repeat: int = 2,
) -> dict[str, float]:
    command = f"--prompt-tokens {prompt} --tokens {TOKENS} --depth {depth} --repeat {repeat}"
    options = ("--threads", str(threads), "--json", *command.split())
    return parse_ours(run(*OURS, "bench", "-m", model, *options).stdout)


def bench_theirs(
    peer: Path,
    model: Path,
    threads: int,
    *,
    prompt: int = PROMPT_TOKENS,
    depth: int = 0,
    repeat: int = 2,
) -> dict[str, float]:
    command = f"-t {threads} -p {prompt} -n {TOKENS} -d {depth} -r {repeat} -o json"
    return parse_theirs(run(peer / "llama-bench", "-m", model, *command.split()).stdout)


def parse_ours(text: str) -> dict[str, float]:
    """Of `gemma-cli bench --json`: prefill and decode in tokens a second, read_gb_s."""
    said = json.loads(text)
    return {
        "prefill": said["prefill"]["tok_s"],
        "decode": said["decode"]["tok_s"],
        "read_gb_s": said["read_gb_s"],
    }


def parse_theirs(text: str) -> dict[str, float]:
    """Of `llama-bench -o json`: prefill and decode in tokens a second, bits a weight."""
    records: list[dict[str, Any]] = json.loads(text)
    speeds = {
        "decode" if record["n_gen"] else "prefill": statistics.median(record["samples_ts"])
        for record in records
    }
    return speeds | {"bits": 8 * records[0]["model_size"] / records[0]["model_n_params"]}


def start_ours(model: Path, threads: int) -> tuple[str | Path, ...]:
    options = f"-n 1 -t 0 --raw --threads {threads}"
    return (*OURS, "run", "-m", model, *options.split(), PROMPT)


def start_theirs(peer: Path, model: Path, threads: int) -> tuple[str | Path, ...]:
    # With our context and without a trial run it starts sooner than by default.
    options = f"-n 1 --temp 0 -no-cnv -c 4096 --no-warmup -t {threads}"
    return (peer / "llama-completion", "-m", model, *options.split(), "-p", PROMPT)


def timed(command: Sequence[str | Path]) -> float:
    """The seconds that a whole process takes."""
    started = perf_counter()
    run(*command)
    return perf_counter() - started


# Telling


def ratio(what: str, turn: Turn) -> float:
    """How often ours is as fast as llama.cpp."""
    ours, theirs = turn
    return theirs / ours if what == START else ours / theirs


def table(figures: Figures) -> str:
    """One row for each key, in Markdown."""
    lines = [
        "| model | format | measured | gemma-cli | llama.cpp | ratio (above 1: gemma-cli faster) |",
        "|---|---|---|---|---|---|",
    ]
    for (model, form, what), turns in figures.items():
        ours, theirs = zip(*turns, strict=True)
        ratios = [ratio(what, turn) for turn in turns]
        cells = (model, form, what, spread(ours), spread(theirs), spread(ratios))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """For example "54.1 (52.0 to 55.3)": the median and the range."""
    median, least, most = map(digits, (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def digits(value: float) -> str:
    """Three digits, more of a large number."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def raw_rows(figures: Figures) -> list[dict[str, object]]:
    return [
        {
            "model": model,
            "format": form,
            "measured": what,
            "gemma-cli": [ours for ours, _ in turns],
            "llama.cpp": [theirs for _, theirs in turns],
            "ratio": [ratio(what, turn) for turn in turns],
        }
        for (model, form, what), turns in figures.items()
    ]


def others_seconds() -> float:
    """CPU time that processes other than this one and its children have had, those of other
    virtual machines included; NaN where nothing tells.

    Beside busy processes a table is worth nothing: it is not the same for both engines, as threads
    that wait for each other by spinning lose far more by it.
    """
    try:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
    except (OSError, ValueError):
        return math.nan
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


# Plots


def measure_curves(pair: Pair, peer: Path, n_threads: int, rounds: int) -> Curves:
    """Medians: decoding by depth, prefilling and decoding by threads."""
    turns: dict[tuple[str, int], list[Turn]] = defaultdict(list)
    for n in range(rounds):
        note(f"Round {n + 1} of {rounds}: many minutes.")
        for depth in DEPTHS:
            ours, theirs = in_turn(
                n,
                partial(bench_ours, pair.ours, n_threads, prompt=1, depth=depth, repeat=1),
                partial(
                    bench_theirs, peer, pair.theirs, n_threads, prompt=0, depth=depth, repeat=1
                ),
            )
            turns["depth", depth].append((ours["decode"], theirs["decode"]))
        for threads in range(1, n_threads + 1):
            ours, theirs = in_turn(
                n,
                partial(bench_ours, pair.ours, threads),
                partial(bench_theirs, peer, pair.theirs, threads),
            )
            for what in ("prefill", "decode"):
                turns[what, threads].append((ours[what], theirs[what]))
    curves: Curves = {}
    for (plot, x), measured in turns.items():
        curve = curves.setdefault(plot, {"gemma-cli": {}, "llama.cpp": {}})
        for points, values in zip(curve.values(), zip(*measured, strict=True), strict=True):
            points[x] = statistics.median(values)
    return curves


def draw_curves(curves: Curves, folder: Path) -> None:
    """Writes depth.svg and threads.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "depth.svg", {"decode": curves["depth"]}, "tokens in the context")
    by_threads = {what: curves[what] for what in ("prefill", "decode")}
    draw(folder / "threads.svg", by_threads, "threads")


def draw(path: Path, plots: Mapping[str, Mapping[str, Mapping[int, float]]], across: str) -> None:
    import matplotlib as mpl  # noqa: PLC0415 (wanted for plots alone)
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = path.name  # the same figures make the same file
    figure = Figure((5 * len(plots), 3.5), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(plots), squeeze=False)[0], plots.items(), strict=True
    ):
        for engine, points in curves.items():
            axes.plot(list(points), list(points.values()), marker="o", label=engine)
        axes.set(title=f"{title}, 2B", xlabel=across, ylabel="tokens/s", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    note(f"{path} is written.")


# Processes


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: str | Path, shown: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs a program, its output on standard error if `shown`; GemmaError if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        # The last line with words in it: there may be a frame around them.
        said = re.findall(r".*\w.*", done.stderr or done.stdout or "")
        why = said[-1].strip(" │") if said else f"status {done.returncode}"
        raise GemmaError(f"`{shlex.join(map(str, command))}` failed: {why}")
    return done


if __name__ == "__main__":
    main()
