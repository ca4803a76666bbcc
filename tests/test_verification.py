"""What a file has lost against its source, against direct computation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from checkpoints import random_weights, tiny, write_hf
from numpy.typing import NDArray
from twins import dequantized

from gemma_cli.measure import calibration as calibration_module
from gemma_cli.measure.calibration import Calibration, logits
from gemma_cli.measure.quality import CHUNK, measure_quality, rows_of
from gemma_cli.measure.verification import n_steps, verify
from gemma_cli.runtime import Model
from quantize import pipeline
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile, TensorError, Verification, create
from quantize.tensors import matrix_shapes
from quantize.verification import tensor_errors

CONFIG = replace(tiny("gemma3"), vocab_size=2000)  # two slabs of planes, the last tile not full
SHAPES = matrix_shapes(CONFIG)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return open_checkpoint(write_hf(folder, CONFIG, random_weights(CONFIG)))


def mean_squares() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(4)
    return {name: rng.exponential(size=n).astype(np.float32) for name, (_, n) in SHAPES.items()}


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_errors_are_those_of_the_whole_matrices(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    path = tmp_path / "a.safetensors"
    pipeline.quantize(source, path, bits=bits, method="rtn")
    file, weights, done = ModelFile.open(path), mean_squares(), list[int]()
    monkeypatch.setattr("quantize.verification._PIECE_WEIGHTS", 2000)  # pieces of a tile or two
    found = tensor_errors(source, file, weights, done.append)
    assert list(found) == list(SHAPES)
    assert done == list(range(1, len(SHAPES) + 1))
    for name, (n_out, _) in SHAPES.items():
        w = source.tensors[name].rows(0, n_out).astype(np.float64)
        lost = w - dequantized(file, name)
        # Both sum in float64; differences are rounded to float32 once.
        plain = np.linalg.norm(lost) / np.linalg.norm(w)
        assert found[name].plain == pytest.approx(plain, rel=1e-6)
        scale = np.sqrt(weights[name].astype(np.float64))
        weighted = np.linalg.norm(lost * scale) / np.linalg.norm(w * scale)
        assert found[name].weighted == pytest.approx(weighted, rel=1e-6)
        # The source is bfloat16.
        assert (found[name].plain > 0) == (bits < 16)


def test_a_matrix_of_zeros_has_no_error(tmp_path: Path) -> None:
    name = "layers.0.attn_v"
    weights = random_weights(CONFIG)
    weights[name][:] = 0
    source = open_checkpoint(write_hf(tmp_path / "c", CONFIG, weights))
    pipeline.quantize(source, tmp_path / "a", bits=4)
    assert tensor_errors(source, ModelFile.open(tmp_path / "a"), mean_squares())[name] == (0, 0)


# The record in the file


def longest() -> Verification:
    """Of numbers with as many digits as there are."""
    digits = (1.2345678901234567e-300, 2.2250738585072014e-308, 1234567890123456.7, 1e-300)
    errors = {name: TensorError(*digits[:2]) for name in SHAPES}
    return Verification(2**31 - 1, digits[0], digits[1], digits[2], errors)


def write(
    source: Checkpoint, path: Path, verify: Callable[[ModelFile], Verification] | None
) -> ModelFile:
    pipeline.quantize(source, path, bits=4, verify=verify, force=True)
    return ModelFile.open(path)


def test_a_verification_is_kept_in_the_file(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    plain = write(source, path, None)
    assert plain.verification is None
    seen: list[ModelFile] = []

    def verify(file: ModelFile) -> Verification:
        assert not path.with_name("b.safetensors").exists()
        # Whole, and as it will be.
        assert {n: t.tobytes() for n, t in file.tiles.items()} == {
            n: t.tobytes() for n, t in plain.tiles.items()
        }
        assert file.sha256 == plain.sha256
        seen.append(file)
        return longest()

    file = write(source, path.with_name("b.safetensors"), verify)
    assert len(seen) == 1
    assert file.verification == longest()
    assert file.sha256 == plain.sha256
    assert file.matrices == plain.matrices


def test_the_worst_come_first() -> None:
    errors = {name: TensorError(0.5 + i % 2, float(i)) for i, name in enumerate(SHAPES)}
    errors["layers.1.ffn_down"] = TensorError(0.0, 0.0)
    worst = replace(longest(), errors=errors).worst(5)
    names = [name for name in reversed(SHAPES) if name != "layers.1.ffn_down"]
    assert list(worst.items()) == [(name, errors[name]) for name in names[:5]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GemmaError("It failed."), ValueError()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_verification_that_fails_leaves_nothing(
    source: Checkpoint, tmp_path: Path, error: BaseException, old: bytes | None
) -> None:
    path = tmp_path / "a.safetensors"
    if old:
        path.write_bytes(old)

    def verify(file: ModelFile) -> Verification:
        raise error

    with pytest.raises(type(error)):
        write(source, path, verify)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_file_without_room_takes_no_verification(source: Checkpoint, tmp_path: Path) -> None:
    file = write(source, tmp_path / "a.safetensors", None)

    def copy(path: Path) -> None:
        with create(path, file) as writer:
            for name, values in (file.vectors | file.tiles).items():
                writer.write(name, [values])
            writer.set_verification(longest())

    with pytest.raises(ValueError, match="room"):
        copy(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"kl": "0"},
        {"kl": float("nan")},
        {"same_top": None},
        {"tokens": -1},
        {"errors": {}},
        {"errors": []},
        {"errors": {name: [0.1] for name in SHAPES}},
        {"errors": {name: [0.1, "0.1"] for name in SHAPES}},
    ],
    ids=str,
)
def test_a_damaged_verification_is_refused(change: dict[str, object]) -> None:
    text = json.dumps(json.loads(longest().to_json()) | change)
    with pytest.raises(GemmaError, match="a checkpoint"):
        Verification.from_json(text, list(SHAPES), "a checkpoint")


# Against the checkpoint itself


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_the_divergence_is_that_from_the_checkpoint(generation: str, tmp_path: Path) -> None:
    config = tiny(generation)
    weights = random_weights(config)
    weights["embed"] *= 0.25  # softer predictions, as a Gemma's are
    source = open_checkpoint(write_hf(tmp_path / "c", config, weights, "F32"))
    rng = np.random.default_rng(6)
    text = [rng.integers(4, config.vocab_size, CHUNK, dtype=np.int32) for _ in range(2)]
    pipeline.quantize(source, tmp_path / "base", bits=32)
    base = Model(ModelFile.open(tmp_path / "base"))
    pipeline.quantize(source, tmp_path / "a", bits=4, method="rtn")
    model = Model(ModelFile.open(tmp_path / "a"))
    done: list[int] = []
    found = verify(source, model, text, done.append)
    assert done == list(range(1, n_steps(source, text) + 1))

    expected = measure_quality(model, text, rows_of(base, text))
    assert found.tokens == expected.tokens == 2 * 255
    assert expected.kl is not None
    assert expected.kl.mean > 1e-3
    # The base rounds keys and values to float16, the checkpoint does not; four digits are kept.
    assert found.kl == pytest.approx(expected.kl.mean, rel=1e-2)
    assert found.kl_stderr == pytest.approx(expected.kl.stderr, rel=1e-2)
    assert found.same_top == pytest.approx(expected.same_top, abs=2 / 510)
    assert verify(source, base, text).kl < 1e-3 * found.kl

    calibration = Calibration(source, text, whole=False)
    seen = {name: calibration(name).mean_squares for name in matrix_shapes(config)}
    for name, error in tensor_errors(source, model.file, seen).items():
        assert found.errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("generation", ["gemma2", "gemma3"])
def test_logits_are_those_of_the_reference(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(generation)
    source = open_checkpoint(write_hf(tmp_path / "c", config, random_weights(config)))
    ids = np.random.default_rng(2).integers(0, config.vocab_size, 21, dtype=np.int32)
    monkeypatch.setattr(calibration_module, "_HEAD_LOGITS", 5 * config.vocab_size)
    monkeypatch.setattr(calibration_module, "_HEAD_WEIGHTS", 100 * config.hidden_size)
    calibration = Calibration(source, [ids[:4], ids], whole=False)
    calibration("embed")
    found = [row.copy() for row in logits(source, calibration.stream[1])]
    expected = reference.forward(config, reference.read_weights(source), ids)
    # Both work in float32, in another order: a few roundings a layer.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_numbers_that_overflow_are_said(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["embed"] *= np.float32(1e37)
    source = open_checkpoint(write_hf(tmp_path / "c", CONFIG, weights, "F32"))
    with pytest.raises(GemmaError, match="overflow"):
        list(logits(source, np.full((1, CONFIG.hidden_size), 1e3, np.float32)))
