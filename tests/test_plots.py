"""Figures: files that other programs can open, with what they should show."""

import os
import struct
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gemma_cli.measure import plots
from gemma_cli.measure.plots import Point, plot_divergence, plot_errors
from quantize.errors import GemmaError
from quantize.modelfile import TensorError

ERRORS = {
    **{
        f"layers.{i}.{kind}": TensorError(0.08, 0.01 * (i + 1))
        for i in range(3)
        for kind in ("attn_q", "ffn_down")
    },
    "embed": TensorError(0.005, 0.004),
}
POINTS = [
    Point("gemma-int4 $x_1$", 4.5, 0.1, 0.2),  # no mathematics; more doubt than divergence
    Point("gemma-int8", 8.5, 0.002, 0.0001),
    Point("gemma-模型", 16.0, 0.0, 0.0),
]


def labels(path: Path) -> set[str]:
    """The texts of an SVG file."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}


def check_png(path: Path) -> None:
    """Whether it has the signature, each chunk's checksum is right, and some pixels differ."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels = 8, b""
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + content)
        pixels += content if kind == b"IDAT" else b""
        at += 12 + size
    assert kind == b"IEND"
    assert len(set(zlib.decompress(pixels))) > 2


def test_errors_by_layer_and_kind(tmp_path: Path) -> None:
    plot_errors(tmp_path / "a.svg", "gemma $5", ERRORS)
    assert {"gemma $5", "attn_q", "ffn_down", "embed", "layer"} <= labels(tmp_path / "a.svg")
    plot_errors(tmp_path / "a.PNG", "gemma", ERRORS)
    check_png(tmp_path / "a.PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PNG", "a.svg"]


def test_divergence_against_bits(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "a.svg"
    plot_divergence(path, "wiki.txt", POINTS)
    assert {"wiki.txt", "bits per weight", *(point.name for point in POINTS)} <= labels(path)
    first = path.read_bytes()
    plot_divergence(path, "wiki.txt", POINTS)
    assert path.read_bytes() == first
    plot_divergence(tmp_path / "a.png", "wiki.txt", POINTS)
    check_png(tmp_path / "a.png")
    assert not list(recwarn)  # They would reach the user.


def test_a_failure_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("full")

    path = tmp_path / "a.svg"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        plot_errors(path, "gemma", ERRORS)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GemmaError, match=r"pip install 'gemma-cli\[plot\]'"):
        plots.require()
