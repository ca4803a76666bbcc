"""gemma-cli doctor, and what it knows of Google's models."""

import json
import os
from pathlib import Path

import pytest
from program import Cli, load
from terminals import Terminal

from gemma_cli.measure import machine
from gemma_cli.runtime import bandwidth, isa
from gemma_cli.runtime.model import bytes_per_token
from quantize.tensors import tensor_shapes


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no time goes into measuring."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)


def test_it_finds_what_is_there(cli: Cli, home: Path) -> None:
    result = cli("doctor", "--json", "--threads", "1")
    assert (result.status, result.err) == (0, "")
    found = result.json
    assert found["problems"] == []
    cpu, memory, compiled = (
        json.loads(json.dumps(found[k])) for k in ("cpu", "memory", "compiled")
    )
    assert (cpu["kernels"], cpu["cores"]) == (isa.NAME, os.cpu_count())
    assert isa.NAME in cpu["supported"]
    assert memory["threads"] == 1
    assert memory["read_gb_s"] > 0
    assert compiled["ready"]
    assert compiled["bytes"] > 0
    models = json.loads(json.dumps(found["models"]))
    assert [model["name"] for model in models] == ["base", "chat"]
    for about in models:
        model, _ = load(home, about["name"])
        assert about["bytes"] == (home / "models" / f"{about['name']}.safetensors").stat().st_size
        assert about["bytes_per_token"] == model.bytes_per_token
        cache = model.new_cache(about["context"])
        assert about["cache_bytes"] == cache.nbytes
        assert about["most_tok_s"] == pytest.approx(
            memory["read_gb_s"] * 1e9 / model.bytes_per_token
        )
        assert about["fits"]


def test_it_says_what_is_wrong(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "bad.safetensors").write_bytes(b"nothing of use")
    (tmp_path / "config.toml").write_text("temprature = 1")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    result = cli("doctor")
    assert result.status == 1
    lines = result.err.splitlines()
    assert all(line.startswith("gemma-cli: ") for line in lines)
    for line, text in zip(lines, ("temprature", "bad.safetensors"), strict=True):
        assert text in line
    assert cli("doctor", "--json").json["config"] == {
        "path": str(tmp_path / "config.toml"),
        "exists": True,
        "usable": False,
    }


def test_what_does_not_fit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.memory.memory_left", lambda: 2 * 10**9)
    found = cli("doctor", "--json").json["usual"]
    assert isinstance(found, list)
    fitting = {about["name"]: about["fits"] for about in found}
    assert fitting["Gemma 3 270M"]
    assert fitting["Gemma 3 1B"]
    assert not fitting["Gemma 3 27B"]
    assert not fitting["Gemma 1 7B"]


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal(home: Path, width: int) -> None:
    with Terminal(home, "doctor", width=width, height=60, NO_COLOR="1") as terminal:
        assert terminal.wait() == 0
        assert "Gemma 3 27B" in terminal.text
        assert isa.NAME in terminal.text
        assert b"\x1b[3" not in terminal.received


# Weights in the embedding and besides, in millions: arXiv:2503.19786 (table 1), 2408.00118
# (table 2), 2403.08295 (table 2).
PARAMETERS = {
    "Gemma 3 1B": (302, 698),
    "Gemma 3 4B": (675, 3209),
    "Gemma 3 12B": (1012, 10_759),
    "Gemma 3 27B": (1416, 25_600),
    "Gemma 2 2B": (590, 2024),
    "Gemma 2 9B": (918, 8324),
    "Gemma 2 27B": (1180, 26_047),
    "Gemma 1 2B": (524.550_144, 1981.884_416),
    "Gemma 1 7B": (786.825_216, 7751.248_896),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_are_those_of_the_reports(name: str) -> None:
    """To a hundredth: the reports round, and count the embedding's spare rows in different ways."""
    sizes = {}
    for tensor, shape in tensor_shapes(machine.USUAL[name]).items():
        n = 1
        for side in shape:
            n *= side
        sizes[tensor] = n
    embedding = sizes.pop("embed")
    assert (embedding / 1e6, sum(sizes.values()) / 1e6) == pytest.approx(PARAMETERS[name], rel=0.01)


def test_bytes_of_a_model_that_is_not_here() -> None:
    """4.25 bits a weight in the layers, and 16 a row; 8.5 in the embedding, of which a token reads
    2.5."""
    matrices = machine.planned(machine.USUAL["Gemma 1 2B"])
    layers = [m for name, m in matrices.items() if name != "embed"]
    bits = sum(m.n_out * m.n_in * 4.25 + 16 * m.n_out for m in layers)
    embedding = 256_000 * 2048
    assert 8 * sum(m.nbytes for m in matrices.values()) == bits + embedding * 8.5
    assert 8 * bytes_per_token(matrices) == bits + embedding * 2.5
