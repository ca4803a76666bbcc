"""Tiles against a slow, literal reading of the layout that packing.py describes."""

import struct

import numpy as np
import pytest
import twins
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantize import packing

SHAPES = [(1, 32), (15, 64), (16, 96), (17, 128), (40, 256)]
GROUPED = [
    (fmt, shape, group_size)
    for fmt in ("int4", "int4_dq", "int8")
    for shape in SHAPES
    for group_size in (32, 64, 128)
    if shape[1] % group_size == 0
]


def random_codes(
    fmt: str, shape: tuple[int, int], group_size: int
) -> tuple[NDArray[np.generic], packing.Scales]:
    rng = np.random.default_rng(0)
    codes: NDArray[np.generic] = rng.integers(0, 16, shape, np.uint8)
    if fmt == "int8":
        codes = rng.integers(-128, 128, shape, np.int8)
    n_groups = shape[1] // group_size
    if fmt == "int4_dq":
        units = rng.integers(0x0080, 0x7C00, shape[0]).astype(np.uint16)  # up to 2^121
        steps = rng.integers(-128, 128, (shape[0], n_groups), np.int8)
        return codes, packing.DoubleScales(steps, packing.from_bfloat16(units))
    return codes, rng.standard_normal((shape[0], n_groups)).astype(np.float16)


def tile_byte_by_byte(
    fmt: str, codes: NDArray[np.generic], scales: packing.Scales, tile: int, group_size: int
) -> bytes:
    """One tile, every byte looked up on its own; rows beyond the matrix have codes of byte 0."""

    def code(r: int, i: int) -> int:
        row = 16 * tile + r
        offset = 128 if fmt == "int8" else 0
        return offset + (int(codes[row, i]) if row < len(codes) else 0)

    def scale(row: int, group: int) -> bytes:
        kind, of_groups = "<e", scales
        if isinstance(scales, packing.DoubleScales):
            kind, of_groups = "<b", scales.codes
        return struct.pack(kind, of_groups[row, group] if row < len(codes) else 0)

    out, rows = bytearray(), range(16 * tile, 16 * tile + 16)
    if isinstance(scales, packing.DoubleScales):
        for row in rows:  # a bfloat16 is the upper half of a float32
            out += struct.pack("<f", scales.units[row] if row < len(codes) else 0)[2:]
    for group in range(codes.shape[1] // group_size):
        for row in rows:
            out += scale(row, group)
        for first in range(group * group_size, (group + 1) * group_size, 32):
            for b in range(8 if fmt == "int8" else 4):
                for r in range(16):
                    for j in range(4):
                        byte = code(r, first + 4 * b + j)
                        if fmt != "int8":
                            byte |= code(r, first + 16 + 4 * b + j) << 4
                        out.append(byte)
    return bytes(out)


def plane_byte_by_byte(codes: NDArray[np.uint8], bits: int, run: int) -> bytes:
    """16 rows' codes of so many bits, of a run of 32 inputs, every byte looked up on its own."""
    out = bytearray()
    for b in range(bits):
        for r in range(16):
            for j in range(4):
                inputs = [32 * run + 4 * (b + bits * k) + j for k in range(8 // bits)]
                out.append(sum(int(codes[r, i]) << bits * k for k, i in enumerate(inputs)))
    return bytes(out)


@pytest.mark.parametrize(("fmt", "shape", "group_size"), GROUPED)
def test_codes_lie_where_the_description_says(
    fmt: str, shape: tuple[int, int], group_size: int
) -> None:
    codes, scales = random_codes(fmt, shape, group_size)
    tiles = packing.pack_codes(fmt, codes, scales)
    assert len(tiles) == packing.n_tiles(shape[0])
    for tile, packed in enumerate(tiles):
        assert packed.tobytes() == tile_byte_by_byte(fmt, codes, scales, tile, group_size)


@pytest.mark.parametrize(("fmt", "shape", "group_size"), GROUPED)
def test_codes_come_back(fmt: str, shape: tuple[int, int], group_size: int) -> None:
    codes, scales = random_codes(fmt, shape, group_size)
    tiles = packing.pack_codes(fmt, codes, scales)
    assert tiles.shape[1] == packing.tile_bytes(fmt, shape[1], group_size)
    unpacked, unpacked_scales = packing.unpack_codes(fmt, tiles, shape[1], group_size)
    assert unpacked.dtype == codes.dtype
    n_rows = shape[0]
    np.testing.assert_array_equal(unpacked[:n_rows], codes)
    values, given = packing.scale_values(unpacked_scales), twins.scale_values(scales)
    np.testing.assert_array_equal(values[:n_rows], given)
    assert not values[n_rows:].any()  # so rows filled up are zero whatever their codes


@pytest.mark.parametrize("shape", [(1, 32), (40, 256), (1024, 64), (1100, 64), (2200, 32)])
def test_planes_lie_slab_by_slab(shape: tuple[int, int]) -> None:
    """Of 64 tiles the upper two bits with their scales, then two single ones, the low nibbles."""
    codes, scales = random_codes("int8", shape, 32)
    tiles = packing.pack_codes("int8_planes", codes, scales)
    assert tiles.shape == (-(-shape[0] // 16), packing.tile_bytes("int8_planes", shape[1], 32))
    whole = np.zeros((16 * len(tiles), shape[1]), np.uint8)
    whole[: len(codes)] = codes.astype(np.int64) + 128
    whole[len(codes) :] = 128
    some = np.zeros((len(whole), scales.shape[1]), np.float16)
    some[: len(scales)] = scales
    expected = bytearray()
    for slab in range(0, len(whole), 1024):
        starts = range(slab, min(slab + 1024, len(whole)), 16)
        for start in starts:
            for run in range(shape[1] // 32):
                expected += some[start : start + 16, run].tobytes()
                expected += plane_byte_by_byte(whole[start : start + 16] >> 6, 2, run)
        for bit in (5, 4):
            for start in starts:
                for run in range(shape[1] // 32):
                    expected += plane_byte_by_byte(whole[start : start + 16] >> bit & 1, 1, run)
        low = packing.pack_codes("int4", whole[slab : slab + 1024] & 15, some[slab : slab + 1024])
        expected += low.reshape(len(low), -1, 288)[:, :, 32:].tobytes()
    assert tiles.tobytes() == bytes(expected)
    unpacked, unpacked_scales = packing.unpack_codes("int8_planes", tiles, shape[1], 32)
    np.testing.assert_array_equal(unpacked[: len(codes)], codes)
    np.testing.assert_array_equal(unpacked_scales[: len(codes)], scales)


@pytest.mark.parametrize("n_rows", [32, 1104, 40_000])
def test_remainders_are_what_the_first_planes_leave(n_rows: int) -> None:
    """The mean and variance of all codes, from those of some tiles."""
    rng = np.random.default_rng(1)
    codes = np.clip(rng.normal(0, 40, (n_rows, 64)), -128, 127).astype(np.int8)
    codes[:, 32:] = codes[:, 32:] & -16  # nothing but zeros in the low nibbles
    tiles = packing.pack_codes("int8_planes", codes, np.ones((n_rows, 2), np.float16))
    bytes_ = codes.astype(np.int64) + 128
    found = packing.remainders(tiles, 64)
    for (mean, variance), left in zip(found, (bytes_ % 64, bytes_ % 32, bytes_ % 16), strict=True):
        # Five deviations of a mean of 16,384 codes, and five of a variance, which is at least as
        # certain as a normal curve's: no code is far from the mean.
        n = min(codes.size, 16 * 16 * 64)
        assert abs(mean - left.mean()) < 5 * left.std() / n**0.5
        assert abs(variance / left.var() - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_lie_input_by_input_and_come_back(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape, np.float32)
    tiles = packing.pack_floats("f32", rows)
    assert tiles.shape[1] == packing.tile_bytes("f32", shape[1], 0)
    for tile, packed in enumerate(tiles):
        expected = [
            float(rows[row, i]) if row < len(rows) else 0.0
            for i in range(shape[1])
            for row in range(16 * tile, 16 * tile + 16)
        ]
        assert packed.tobytes() == struct.pack(f"<{len(expected)}f", *expected)
    np.testing.assert_array_equal(packing.unpack_floats("f32", tiles, shape[1])[: len(rows)], rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_tiles_are_the_upper_halves_of_float32_tiles(shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, shape).astype(np.uint32) << 16
    rows = bits.view(np.float32)
    tiles = packing.pack_floats("bf16", rows)
    assert tiles.shape[1] == packing.tile_bytes("bf16", shape[1], 0)
    whole = packing.pack_floats("f32", rows).view("<u4") >> 16
    np.testing.assert_array_equal(tiles.view("<u2"), whole)
    np.testing.assert_array_equal(packing.unpack_floats("bf16", tiles, shape[1])[: len(rows)], rows)


def nearest_bfloat16(value: float) -> float:
    """By trying the bfloat16 below, the one above and, for a tie, whose last bit is 0."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low = bits & 0xFFFF0000
    around = [low, low + 0x10000]
    floats = [struct.unpack("<f", struct.pack("<I", b))[0] for b in around]
    if abs(floats[1]) == float("inf"):
        return float(floats[0])
    errors = [abs(value - f) for f in floats]
    if errors[0] == errors[1]:
        return float(floats[0] if (low >> 16) % 2 == 0 else floats[1])
    return float(floats[errors.index(min(errors))])


LARGEST = float(np.finfo(np.float32).max)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_is_the_nearest(value: float) -> None:
    rounded = packing.from_bfloat16(packing.to_bfloat16(np.array([value], np.float32)))
    assert struct.pack("<f", rounded[0]) == struct.pack("<f", nearest_bfloat16(value))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-8, 1.0),  # a tie, down to even
        (1 + 3 * 2**-8, 1 + 2**-6),  # a tie, up to even
        (1 + 2**-8 + 2**-23, 1 + 2**-7),
        (-0.0, -0.0),
        (2.0**-149, 0.0),
        (LARGEST, 2.0**128 - 2.0**120),  # rounding up would be infinite
        (-LARGEST, -(2.0**128) + 2.0**120),
    ],
)
def test_bfloat16_at_ties_and_ends(value: float, rounded: float) -> None:
    bits = packing.to_bfloat16(np.array([value], np.float32))
    assert struct.pack("<f", packing.from_bfloat16(bits)[0]) == struct.pack("<f", rounded)
