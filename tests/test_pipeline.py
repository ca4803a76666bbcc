"""Conversions end to end: what is kept exactly, what is refused, and what a failure leaves."""

import builtins
import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import (
    gguf_name,
    random_weights,
    tiny,
    write_gguf,
    write_hf,
)
from gguf import GGMLQuantizationType
from torch_files import gemma_pytorch_tensors, write_ckpt
from twins import dequantized

from quantize import packing
from quantize.checkpoint import open_checkpoint
from quantize.errors import GemmaError
from quantize.grouping import round_int4
from quantize.modelfile import ModelFile
from quantize.packing import IQ4_NL_LEVELS, LINEAR_LEVELS
from quantize.pipeline import Progress, plan, quantize
from quantize.statistics import Calibration, InputStatistics
from quantize.tensors import matrix_shapes, norm_sizes

CONFIG = tiny("gemma3")
WEIGHTS = random_weights(CONFIG)
MATRIX = "layers.1.ffn_down"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "checkpoint", CONFIG, WEIGHTS)


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


# What a model file holds


@pytest.mark.parametrize(
    ("recipe", "bits", "layers", "embed"),
    [
        ("default", 4, "int4_dq", "int8_planes"),
        ("small", 4, "int4_dq", "int4_dq"),
        ("default", 8, "int8", "int8_planes"),
        ("default", 16, "bf16", "bf16"),
        ("default", 32, "f32", "f32"),
    ],
)
def test_recipes(
    source: Path, tmp_path: Path, recipe: str, bits: int, layers: str, embed: str
) -> None:
    checkpoint, output = open_checkpoint(source), tmp_path / "new" / "a.safetensors"
    summary = quantize(checkpoint, output, bits=bits, recipe=recipe, method="rtn")
    file = ModelFile.open(output)
    for name, m in file.matrices.items():
        assert m.format == (embed if name == "embed" else layers)
        assert m.group_size == (32 if bits in {4, 8} else 0)
        assert m.codebook == (LINEAR_LEVELS if m.format == "int4_dq" else None)
    planned = plan(checkpoint, bits, recipe=recipe)
    assert {p.name: p.spec for p in planned} == file.matrices
    assert not any(p.exact for p in planned)
    assert summary.bytes == output.stat().st_size
    assert summary.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert summary.bits_per_weight == file.bits_per_weight
    assert (file.config, file.chat, file.source) == (CONFIG, "base", "checkpoint")
    assert file.tokenizer_model == checkpoint.tokenizer_model


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(("bits", "dtype"), [(16, "BF16"), (32, "BF16"), (32, "F32")])
def test_bfloat16_and_float32_are_kept_exactly(
    tmp_path: Path, generation: str, bits: int, dtype: str
) -> None:
    config = tiny(generation)
    weights = random_weights(config)
    if dtype == "F32":
        noise = np.random.default_rng(1)
        for name in matrix_shapes(config):
            weights[name] = noise.standard_normal(weights[name].shape, np.float32)
    folder = write_hf(tmp_path / "checkpoint", config, weights, dtype)
    quantize(open_checkpoint(folder), tmp_path / "a.safetensors", bits=bits)
    file = ModelFile.open(tmp_path / "a.safetensors")
    for name in matrix_shapes(config):
        np.testing.assert_array_equal(dequantized(file, name), weights[name])
    for name in norm_sizes(config):
        np.testing.assert_array_equal(file.vectors[name], weights[name])


def test_large_weights_stay_finite_in_bfloat16(tmp_path: Path) -> None:
    largest = np.finfo(np.float32).max
    weights = WEIGHTS | {MATRIX: np.full_like(WEIGHTS[MATRIX], largest)}
    folder = write_hf(tmp_path / "checkpoint", CONFIG, weights, "F32")
    quantize(open_checkpoint(folder), tmp_path / "a.safetensors", bits=16)
    rounded = dequantized(ModelFile.open(tmp_path / "a.safetensors"), MATRIX)
    np.testing.assert_array_equal(rounded, packing.LARGEST_BFLOAT16)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("Q4_0", 4), ("IQ4_NL", 4), ("Q4_0", 8), ("Q5_0", 8), ("Q8_0", 8), ("Q8_0", 4)],
)
def test_blocks_of_a_gguf_file_go_over_as_they_are(tmp_path: Path, dtype: str, bits: int) -> None:
    path = write_gguf_blocks(tmp_path / "a.gguf", dtype)
    checkpoint = open_checkpoint(path)
    output = tmp_path / "a.safetensors"
    quantize(checkpoint, output, bits=bits)
    file = ModelFile.open(output)
    exact = {p.name for p in plan(checkpoint, bits) if p.exact}
    assert exact == ({"embed"} if (dtype, bits) == ("Q8_0", 4) else expected_exact(dtype, bits))
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in exact:
        tensor, m = theirs[gguf_name(name)], file.matrices[name]
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = dequantized(file, name)
        np.testing.assert_array_equal(ours.view(np.uint32), wide.view(np.uint32))
        codes, scales = packing.unpack_codes(m.format, file.tiles[name], m.n_in, 32)
        grid = checkpoint.tensors[name].grid(0, m.n_out)
        assert grid is not None
        np.testing.assert_array_equal(scales[: m.n_out], grid.scales)
        offset = 8 if (m.format, dtype) == ("int4", "Q4_0") else 0
        np.testing.assert_array_equal(codes[: m.n_out], grid.codes + offset)
        expected = IQ4_NL_LEVELS if dtype == "IQ4_NL" else LINEAR_LEVELS
        assert m.codebook == (expected if m.format == "int4" else None)


def expected_exact(dtype: str, bits: int) -> set[str]:
    """Every matrix, but an embedding of IQ4_NL, whose levels 8 linear bits do not have."""
    return set(matrix_shapes(CONFIG)) - ({"embed"} if dtype == "IQ4_NL" else set())


def write_gguf_blocks(path: Path, dtype: str) -> Path:
    """A GGUF file of random blocks, so that every code is met."""
    rng = np.random.default_rng(0)
    kind = GGMLQuantizationType[dtype]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    weights = {}
    for name, values in WEIGHTS.items():
        if values.ndim == 1:
            weights[name] = values
            continue
        blocks = rng.integers(0, 256, (values.size // 32, block_bytes), np.uint8)
        scales = rng.standard_normal(len(blocks)).astype("<f2")
        blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
        weights[name] = blocks.reshape(len(values), -1)
    return write_gguf(path, CONFIG, weights, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups(tmp_path: Path, bits: int, group_size: int) -> None:
    config = replace(CONFIG, hidden_size=128, intermediate_size=256)
    weights = random_weights(config)
    # Coarser groups than the source's: its blocks cannot be kept.
    path = write_gguf(tmp_path / "a.gguf", config, weights, "Q8_0")
    checkpoint = open_checkpoint(path)
    assert not any(p.exact for p in plan(checkpoint, bits, group_size))
    quantize(checkpoint, tmp_path / "a.safetensors", bits=bits, group_size=group_size, method="rtn")
    file = ModelFile.open(tmp_path / "a.safetensors")
    how = ", rtn" if bits == 4 else ""
    assert file.recipe == f"default, {bits} bits, groups of {group_size}{how}"
    for name, m in file.matrices.items():
        assert m.group_size == group_size
        four = m.format == "int4_dq"
        bits_of_scales = 8 / group_size + 16 / m.n_in if four else 16 / group_size
        assert m.bits_per_weight == (4 if four else 8) + bits_of_scales
        wide = checkpoint.tensors[name].rows(0, m.n_out)
        largest = np.abs(wide.reshape(m.n_out, -1, group_size)).max(-1)
        # Half a step; at 4 bits a whole one, for what would be 8 becomes 7. Over 127 steps
        # float16's 11 bits of the scale add a sixteenth of a step; over 8, half a unit of the row.
        step = largest / (8 if four else 127)
        error = np.abs(dequantized(file, name) - wide).reshape(m.n_out, -1, group_size).max(-1)
        if four:
            unit = largest.max(1, keepdims=True) / 8 / 127 * (1 + 2**-6)
            assert (error <= step + 8 * unit / 2).all()
        else:
            assert (error <= step * (0.5 + 127 / 2**11)).all()


def test_pieces_of_a_matrix_follow_each_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.pipeline._PIECE_WEIGHTS", 1)  # one tile at a time
    quantize(open_checkpoint(source), tmp_path / "a.safetensors", bits=4, method="rtn")
    file = ModelFile.open(tmp_path / "a.safetensors")
    for name in set(matrix_shapes(CONFIG)) - {"embed"}:
        codes, scales = round_int4(WEIGHTS[name], 32, double=True)
        np.testing.assert_array_equal(
            file.tiles[name], packing.pack_codes("int4_dq", codes, scales), err_msg=name
        )


def statistics(name: str) -> InputStatistics:
    """Of inputs that depend on each other."""
    rng = np.random.default_rng(len(name))
    n_in = matrix_shapes(CONFIG)[name][1]
    x = rng.standard_normal((500, n_in)) @ (np.eye(n_in) + rng.standard_normal((n_in, n_in)) / 8)
    gram = (x.T @ x / len(x)).astype(np.float32)
    return InputStatistics(gram[None])


def in_blocks(name: str) -> InputStatistics:
    """The same of each 32 inputs."""
    (gram,) = statistics(name).gram
    cuts = [slice(start, start + 32) for start in range(0, len(gram), 32)]
    return InputStatistics(np.stack([gram[cut, cut] for cut in cuts]))


def output_error(file: ModelFile, name: str) -> float:
    """Mean square of what a matrix's outputs lose on such inputs."""
    (gram,) = statistics(name).gram
    error = (dequantized(file, name) - WEIGHTS[name]).astype(np.float64)
    return float(np.einsum("ri,ij,rj->", error, gram, error)) / len(error)


def test_each_method_loses_less_than_the_one_before(source: Path, tmp_path: Path) -> None:
    errors = {}
    for method, calibration in (
        ("rtn", None),
        ("search", None),
        ("search", in_blocks),
        ("gptq", statistics),
    ):
        quantize(
            open_checkpoint(source),
            tmp_path / "a",
            bits=4,
            method=method,
            calibration=calibration,
            force=True,
        )
        file = ModelFile.open(tmp_path / "a")
        assert method in file.recipe
        assert ("calibrated" in file.recipe) == (calibration is not None)
        layers = set(matrix_shapes(CONFIG)) - {"embed"}
        errors[method, calibration] = sum(output_error(file, name) for name in layers)
    losses = list(errors.values())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("method", "calibration"),
    [("rtn", None), ("search", None), ("search", in_blocks), ("gptq", statistics)],
)
def test_the_number_of_threads_changes_no_byte(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    calibration: Calibration | None,
) -> None:
    checkpoint, sums = open_checkpoint(source), set()
    monkeypatch.setattr("quantize.pipeline._PIECE_WEIGHTS", 1)
    monkeypatch.setattr("quantize.pipeline._COMPENSATED_ROWS", 16)
    for n_threads in (1, 2, 5):
        monkeypatch.setattr("quantize.pipeline._N_THREADS", n_threads)
        output = tmp_path / str(n_threads)
        summary = quantize(checkpoint, output, bits=4, method=method, calibration=calibration)
        sums.add(summary.sha256)
    assert len(sums) == 1


@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
def test_a_hidden_grid_is_kept(tmp_path: Path, method: str) -> None:
    """As in checkpoints of a quantization-aware training, whose weights are 16 bits wide still."""
    rng, weights = np.random.default_rng(9), dict(WEIGHTS)
    for name in (MATRIX, "layers.0.attn_q"):
        shape = weights[name].shape
        scales = (rng.standard_normal((shape[0], shape[1] // 32, 1)) * 0.01).astype(np.float16)
        codes = rng.integers(-8, 8, (*scales.shape[:2], 32))
        on_grid = (codes * scales.astype(np.float32)).astype(np.float32).reshape(shape)
        weights[name] = packing.from_bfloat16(packing.to_bfloat16(on_grid))
    source = open_checkpoint(write_hf(tmp_path / "checkpoint", CONFIG, weights, "BF16"))
    calibration = statistics if method == "gptq" else None
    quantize(source, tmp_path / "a", bits=4, method=method, calibration=calibration)
    file = ModelFile.open(tmp_path / "a")
    for name in (MATRIX, "layers.0.attn_q"):
        assert file.matrices[name].format == "int4"
        held = source.tensors[name].rows(0, len(weights[name]))
        kept = packing.from_bfloat16(packing.to_bfloat16(dequantized(file, name)))
        np.testing.assert_array_equal(kept, held, err_msg=name)
    assert file.matrices["layers.0.attn_k"].format == "int4_dq"
    other = source.tensors["layers.0.attn_k"].rows(0, file.matrices["layers.0.attn_k"].n_out)
    assert not np.array_equal(dequantized(file, "layers.0.attn_k"), other)


def test_two_conversions_are_equal(source: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first = quantize(open_checkpoint(source), a, bits=4)
    assert quantize(open_checkpoint(source), b, bits=4).sha256 == first.sha256
    assert quantize(open_checkpoint(source), a, bits=4, force=True).sha256 == first.sha256


def test_progress_grows_to_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    checkpoint = open_checkpoint(source)
    quantize(checkpoint, tmp_path / "a.safetensors", bits=4, progress=seen.append)
    for field in ("tensors_done", "bytes_done"):
        done = [getattr(p, field) for p in seen]
        assert done == sorted(done)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert {(p.tensors, p.bytes) for p in seen} == {(len(checkpoint.tensors), total)}
    assert (seen[-1].tensors_done, seen[-1].bytes_done) == (len(checkpoint.tensors), total)


# What is refused


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_do_not_divide_a_matrix_are_refused(
    source: Path, tmp_path: Path, bits: int
) -> None:
    with pytest.raises(GemmaError, match=r"96 inputs in layers\.0\.ffn_down.*--group-size"):
        quantize(open_checkpoint(source), tmp_path / "a", bits=bits, group_size=64)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_matrices_of_a_width_that_no_kernel_reads_are_refused(tmp_path: Path, size: str) -> None:
    config = replace(CONFIG, **{size: 80})
    folder = write_hf(tmp_path / "checkpoint", config, random_weights(config))
    with pytest.raises(GemmaError, match=f"{size} 80 is not a multiple of 32"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("name", [MATRIX, "layers.0.q_norm", "embed"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused_by_its_name(
    tmp_path: Path, bits: int, name: str, value: float
) -> None:
    weights = WEIGHTS | {name: WEIGHTS[name].copy()}
    weights[name].flat[-1] = value
    folder = write_hf(tmp_path / "checkpoint", CONFIG, weights)
    with pytest.raises(GemmaError, match=f"{folder} .*not a number or infinite in {name};"):
        quantize(open_checkpoint(folder), tmp_path / "a.safetensors", bits=bits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused_by_its_name(
    tmp_path: Path, bits: int, value: float
) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, "Q4_0")
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == gguf_name(MATRIX))
    data[tensor.data_offset + 18 : tensor.data_offset + 20] = np.float16(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(GemmaError, match=f"not a number or infinite in {MATRIX};"):
        quantize(open_checkpoint(path), tmp_path / "out", bits=bits)
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_exists_is_replaced_by_force_only(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere" / "a.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"old")
    with pytest.raises(GemmaError, match=f"{output} exists already; .*--force"):
        quantize(open_checkpoint(source), output, bits=4)
    assert output.read_bytes() == b"old"
    quantize(open_checkpoint(source), output, bits=4, force=True)
    ModelFile.open(output)


def test_a_folder_is_no_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(GemmaError, match="models is a folder"):
        quantize(open_checkpoint(source), tmp_path / "models", bits=4, force=True)


@pytest.mark.parametrize("kind", ["itself", "symlink", "hardlink", "partial"])
def test_a_gguf_file_is_never_its_own_output(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.partial" if kind == "partial" else "a.gguf")
    output = tmp_path / {"itself": "a.gguf", "partial": "a"}.get(kind, "b.gguf")
    write_gguf(path, CONFIG, WEIGHTS)
    if kind == "symlink":
        output.symlink_to(path)
    if kind == "hardlink":
        os.link(path, output)
    before = path.read_bytes()
    with pytest.raises(GemmaError, match="would destroy the checkpoint"):
        quantize(open_checkpoint(path), output, bits=4, force=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
@pytest.mark.parametrize("opened", ["", "model.safetensors"])
def test_no_file_of_a_checkpoint_is_its_output(source: Path, name: str, opened: str) -> None:
    before = (source / name).read_bytes()
    with pytest.raises(GemmaError, match="checkpoint"):
        quantize(open_checkpoint(source / opened), source / name, bits=4, force=True)
    assert (source / name).read_bytes() == before


def test_a_model_file_beside_its_checkpoint_is_replaced_by_force(source: Path) -> None:
    for bits in (4, 8):
        quantize(open_checkpoint(source), source / "a.safetensors", bits=bits, force=True)
    assert ModelFile.open(source / "a.safetensors").recipe.startswith("default, 8 bits")


@pytest.mark.parametrize("output", ["a/file/in/it", "x" * 300])
def test_an_output_that_cannot_be_is_one_sentence(
    source: Path, tmp_path: Path, output: str
) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(GemmaError, match="cannot be written"):
        quantize(open_checkpoint(source), tmp_path / output, bits=4)


def test_no_file_that_is_read_is_the_output(source: Path, tmp_path: Path) -> None:
    """As in the hub's cache, whose folders hold links to files elsewhere."""
    blob = tmp_path / "blob"
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    with pytest.raises(GemmaError, match="would destroy the checkpoint"):
        quantize(open_checkpoint(source), blob, bits=4, force=True)
    assert blob.read_bytes() == before


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = open_checkpoint(source), tmp_path / "models" / "a.safetensors"
    usage = shutil.disk_usage(tmp_path)
    needed = quantize(checkpoint, tmp_path / "b", bits=4).bytes
    for free, enough in ((needed, True), (needed // 2, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
        if enough:
            quantize(checkpoint, output, bits=4)
            output.unlink()
        else:
            with pytest.raises(GemmaError, match=f"{output} takes .* free some space"):
                quantize(checkpoint, output, bits=4)
            assert not list(output.parent.iterdir())


@pytest.mark.parametrize("change", ["written", "replaced", "gone", "touched", "cut"])
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "ckpt"])
def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, kind: str, change: str) -> None:
    if kind == "safetensors":
        file = write_hf(tmp_path / "checkpoint", CONFIG, WEIGHTS) / "model.safetensors"
    elif kind == "gguf":
        file = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS)
    else:
        file = write_ckpt(tmp_path / "checkpoint", CONFIG, gemma_pytorch_tensors(CONFIG, WEIGHTS))
    data, then = file.read_bytes(), file.stat().st_mtime_ns
    checkpoint = open_checkpoint(file)

    def change_it(progress: Progress) -> None:
        if progress.tensors_done == 3:
            if change == "written":
                with file.open("r+b") as out:
                    out.write(data)
                os.utime(file, ns=(then + 1, then + 1))
            elif change == "replaced":
                file.with_name("new").write_bytes(data)
                os.utime(file.with_name("new"), ns=(then, then))
                file.with_name("new").replace(file)
            elif change == "gone":
                file.unlink()
            elif change == "cut":
                os.truncate(file, 100)
            else:
                os.utime(file, ns=(then + 1, then + 1))

    output = tmp_path / "models" / "a.safetensors"
    with pytest.raises(GemmaError, match=f"{file} was changed while it was being read"):
        quantize(checkpoint, output, bits=8, progress=change_it)
    assert not list(output.parent.iterdir())


# What a failure leaves


class Faults:
    """Makes the n-th of all writes, fsyncs and renames fail, and counts them.

    `short`: writes take only some of what they are given, as the system may, and so does the one
    that fails before it does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int, short: bool) -> None:
        self.fail_at, self.calls, self.error = -1, 0, error
        real_open, faults = builtins.open, self

        class FaultyFile(io.FileIO):
            def write(self, data: Any) -> int:
                faults.call()
                return super().write(data[: max(1, len(data) * 2 // 3)] if short else data)

        def faulty_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if str(file).endswith(".partial"):
                return io.BufferedWriter(FaultyFile(file, mode, *args, **kwargs), 512)
            return real_open(file, mode, *args, **kwargs)

        def faulty(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                faults.call()
                return function(*args)

            return call

        monkeypatch.setattr("quantize.modelfile.open", faulty_open, raising=False)
        monkeypatch.setattr(os, "fsync", faulty(os.fsync))
        monkeypatch.setattr(os, "replace", faulty(os.replace))

    def call(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(
    ("old", "error", "short"),
    [(None, errno.ENOSPC, False), (b"old", errno.EIO, False), (b"old", errno.ENOSPC, True)],
)
def test_after_any_failing_call_the_target_is_absent_old_or_whole(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: bytes | None,
    error: int,
    short: bool,
) -> None:
    folder = tmp_path / "models"
    output = folder / "a.safetensors"
    checkpoint = open_checkpoint(source)
    whole = quantize(checkpoint, output, bits=4).sha256
    faults = Faults(monkeypatch, error, short)
    assert quantize(checkpoint, output, bits=4, force=True).sha256 == whole
    n_calls = faults.calls
    assert n_calls > 2 * len(checkpoint.tensors) / 3  # norms wait in the buffer for others
    # Short writes are many, and alike.
    for fail_at in range(1, n_calls + 1) if not short else (*range(1, n_calls, 7), n_calls):
        output.unlink(missing_ok=True)
        if old is not None:
            output.write_bytes(old)
        faults.calls, faults.fail_at = 0, fail_at
        with pytest.raises(GemmaError, match=rf"{output} cannot be written \({os.strerror(error)}"):
            quantize(checkpoint, output, bits=4, force=True)
        assert not partials(tmp_path)
        if fail_at < n_calls:
            assert (output.read_bytes() if output.exists() else None) == old
    # The last call makes the rename itself last, which has been done by then.
    assert hashlib.sha256(output.read_bytes()).hexdigest() == whole


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "ckpt", "model file"])
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EIO, errno.EACCES])
def test_any_mapping_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: int
) -> None:
    read: Callable[[Path], object] = open_checkpoint
    if kind == "gguf":
        path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS)
    elif kind == "ckpt":
        path = write_ckpt(tmp_path / "a", CONFIG, gemma_pytorch_tensors(CONFIG, WEIGHTS))
    else:
        path = write_hf(tmp_path / "a", CONFIG, WEIGHTS)
    if kind == "model file":
        path, read = tmp_path / "b", ModelFile.open
        quantize(open_checkpoint(tmp_path / "a"), path, bits=4)
    left, real = 1000, np.memmap

    def memmap(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    monkeypatch.setattr(np, "memmap", memmap)
    read(path)
    assert left < 1000
    for n in range(1, 1001 - left):
        left = n
        with pytest.raises(GemmaError, match=rf"{tmp_path}.* \({os.strerror(error)}\)"):
            read(path)


def test_nobody_else_reads_a_file_that_is_not_whole(source: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "models" / "a", set()
    for umask in (0o022, 0o027):

        def look(progress: Progress) -> None:
            seen.update(path.stat().st_mode & 0o777 for path in partials(tmp_path))

        before = os.umask(umask)
        try:
            quantize(open_checkpoint(source), output, bits=4, force=True, progress=look)
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        assert output.stat().st_mode & 0o777 == 0o666 & ~umask
    assert seen == {0o600}


def test_an_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.bytes_done > progress.bytes // 2:
            raise KeyboardInterrupt

    folder = tmp_path / "models"
    with pytest.raises(KeyboardInterrupt):
        quantize(open_checkpoint(source), folder / "a", bits=4, progress=interrupt)
    assert not list(folder.iterdir())


CONVERT = """
import sys
from pathlib import Path
from quantize.checkpoint import open_checkpoint
from quantize.pipeline import quantize
checkpoint = open_checkpoint(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    quantize(checkpoint, Path(sys.argv[2]), bits=4, force=True)
"""


def test_killed_at_any_time_the_target_is_whole(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "a.safetensors"
    checkpoint = open_checkpoint(source)
    whole = quantize(checkpoint, output, bits=4).sha256
    delays = np.random.default_rng(0).uniform(0, 0.05, int(os.environ.get("KILLS", "12")))
    for delay in delays:
        with subprocess.Popen(
            [sys.executable, "-c", CONVERT, source, output], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert hashlib.sha256(output.read_bytes()).hexdigest() == whole
    quantize(checkpoint, output, bits=4, force=True)
    assert list(output.parent.iterdir()) == [output]


def test_conversions_to_one_target_do_not_mix(source: Path, tmp_path: Path) -> None:
    """Processes that start together: each finishes or says that another is at work."""
    output = tmp_path / "models" / "a.safetensors"
    whole = quantize(open_checkpoint(source), output, bits=4).sha256
    convert = CONVERT.replace("while True", "for _ in range(5)")
    command = [sys.executable, "-c", convert, source, output]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    while any(process.poll() is None for process in running):
        assert hashlib.sha256(output.read_bytes()).hexdigest() == whole
        time.sleep(0.01)
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0 or "is being written by another gemma-cli" in errors, errors
    assert any(process.returncode == 0 for process in running)
    assert list(output.parent.iterdir()) == [output]
