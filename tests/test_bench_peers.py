"""What bench_peers.py makes of figures, texts and sources; no engine runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_peers
import numpy as np
import pytest
from checkpoints import tiny
from numpy.testing import assert_array_equal

from quantize.checkpoint import open_checkpoint
from quantize.errors import GemmaError

OURS = """{"model": "m", "threads": 2, "prefill": {"tokens": 512, "tok_s": 748.5}, "decode":
{"tokens": 64, "depth": 0, "tok_s": 70.25}, "read_gb_s": 31.5, "bytes_per_token": 1, "rss_mb": 1.0,
"roofline": 0.5}"""
LOG = (
    "0.01 I system_info: n_threads = 2 / 2 | CPU : AVX2 = 1 | AVX512 = 0 | REPACK = 1 | \nmore = 1"
)
CMAKE = """set(GGML_VERSION_MAJOR 0)
set(GGML_VERSION_MINOR 25)
set(GGML_VERSION_PATCH 3)
set(GGML_VERSION_BASE "${GGML_VERSION_MAJOR}.${GGML_VERSION_MINOR}.${GGML_VERSION_PATCH}")
"""


def record(n_prompt: int, n_gen: int, *samples: float) -> dict[str, Any]:
    return {
        "model_size": 900,
        "model_n_params": 1600,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "avg_ts": 0.0,
        "samples_ts": samples,
    }


def test_our_json() -> None:
    expected = {"prefill": 748.5, "decode": 70.25, "read_gb_s": 31.5}
    assert bench_peers.parse_ours(OURS) == expected


def test_their_json() -> None:
    text = json.dumps([record(512, 0, 330.0, 340.0), record(0, 64, 55.0, 59.0, 56.0)])
    expected = {"prefill": 335.0, "decode": 56.0, "bits": 4.5}
    assert bench_peers.parse_theirs(text) == expected
    # Without a prompt there is only decoding.
    assert bench_peers.parse_theirs(json.dumps([record(0, 64, 2.0)])) == {
        "decode": 2.0,
        "bits": 4.5,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 0.5.0 (build 1, commit 0c1)\nbuilt", "llama.cpp 0.5.0 (build 1, commit 0c1)"),
        ("version: 0.5.0 (build 0, commit unknown)\n", "llama.cpp 0.5.0"),
        ("usage: llama-bench", "llama.cpp"),
    ],
)
def test_version(text: str, expected: str) -> None:
    assert bench_peers.parse_version(text) == expected


def test_ggml_version_and_instructions() -> None:
    assert bench_peers.parse_ggml_version(CMAKE) == ", ggml 0.25.3"
    assert bench_peers.parse_ggml_version("") == ""
    assert bench_peers.parse_instructions(LOG) == "AVX2, REPACK"
    assert bench_peers.parse_instructions("") == "instructions unknown"


def test_tile_configuration_is_guarded_once_a_call() -> None:
    guard = '__asm__ volatile("" ::: "memory");\n'
    source = "    rows[0] = 8;\n    _tile_loadconfig(&a);\n    x();\n\t_tile_loadconfig(&b);\n"
    assert bench_peers.guard_tile_config(source) == (
        f"    rows[0] = 8;\n    {guard}    _tile_loadconfig(&a);\n    x();\n"
        f"\t{guard}\t_tile_loadconfig(&b);\n"
    )
    assert bench_peers.guard_tile_config("_tile_zero(0);\n") == "_tile_zero(0);\n"


def test_ratio_is_above_one_where_ours_is_faster() -> None:
    assert bench_peers.ratio(bench_peers.DECODE, (30.0, 20.0)) == 1.5
    assert bench_peers.ratio(bench_peers.START, (2.0, 3.0)) == 1.5


def test_table_has_the_median_of_the_ratios_of_each_round() -> None:
    # The ratios are 2, 1 and 4; that of the medians would be 3.
    figures = {
        ("2B", "int4", bench_peers.PREFILL): [(200.0, 100.0), (300.0, 300.0), (400.0, 100.0)],
        ("2B", "int4", bench_peers.START): [(0.5, 1.25)],
    }
    rows = bench_peers.table(figures).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2:] == [
        "| 2B | int4 | prefill, tokens/s | 300 (200 to 400) | 100 (100 to 300) "
        "| 2.00 (1.00 to 4.00) |",
        "| 2B | int4 | start to first token, s | 0.50 (0.50 to 0.50) | 1.25 (1.25 to 1.25) "
        "| 2.50 (2.50 to 2.50) |",
    ]
    assert bench_peers.raw_rows(figures)[0]["ratio"] == [2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("value", "expected"), [(1.234, "1.23"), (54.06, "54.1"), (748.4, "748"), (12345.6, "12346")]
)
def test_digits(value: float, expected: str) -> None:
    assert bench_peers.digits(value) == expected


def test_engines_take_turns_in_going_first() -> None:
    calls: list[str] = []

    def engine(name: str) -> str:
        calls.append(name)
        return name

    for n in range(3):
        result = bench_peers.in_turn(n, lambda: engine("ours"), lambda: engine("theirs"))
        assert result == ("ours", "theirs")
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_a_file_is_made_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_peers.made(path, interrupted)
    assert not path.exists()
    assert bench_peers.made(path, lambda part: part.write_text("whole")) == path
    assert bench_peers.made(path, interrupted).read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_random_checkpoint_can_be_read(tmp_path: Path) -> None:
    config = replace(tiny("gemma"), vocab_size=300)
    bench_peers.write_random(tmp_path / "random.gguf", config)
    checkpoint = open_checkpoint(tmp_path / "random.gguf")
    assert checkpoint.config == config
    assert_array_equal(checkpoint.tensors["final_norm"].values(), 1)
    embedding = checkpoint.tensors["embed"]
    assert (embedding.shape, embedding.dtype) == ((300, config.hidden_size), "F16")
    assert np.std(embedding.rows(0, 300)) == pytest.approx(0.02, rel=0.1)


def test_a_failure_is_a_sentence() -> None:
    with pytest.raises(GemmaError, match=r"^`.*` failed: no such thing$"):
        bench_peers.run(
            bench_peers.OURS[0], "-c", "import sys; sys.exit('first\\n│ no such thing │\\n╰──╯')"
        )
