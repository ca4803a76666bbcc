"""Tiles: the order in which weights lie in a model file, which is the order kernels read them in.

A matrix (n_out, n_in) is cut into tiles of 16 rows; the last is filled up with zero rows. In every
format the 16 rows of a tile lie side by side, so that a vector register holds the same inputs of
all rows and no sum ever crosses its lanes.

int4 and int8: a tile is a run of blocks, one for each group of `group_size` inputs:

    16 float16 scales, one a row, then for each 32 inputs of the group
        int4   4 x 64 bytes: byte (4 r + j) of run b holds row r, input 4 b + j in its low nibble
               and input 16 + 4 b + j in its high nibble
        int8   8 x 64 bytes: byte (4 r + j) of run b holds row r, input 4 b + j, as code + 128

int4_dq: int4 with scales that are quantized, too (double quantization, Dettmers et al. 2023,
arXiv:2305.14314): multiples of a unit of their row. A tile begins with its rows' units, 16
bfloat16, and a block with 16 int8 in place of the float16.

int8_planes: int8 in four planes, of which a reader may want only the first ones: the two highest
bits of code + 128, the next, the next, and the low nibble (PLANE_BITS). A slab of SLAB_TILES tiles
(the last one of what is left) has the first plane of all its tiles, in groups with their scales,
then the others one after the other, which are nothing but codes. Of 32 inputs, n bits each are

        n x 64 bytes: byte (4 r + j) of run b holds row r, input 4 (b + n k) + j in its bits from
        n k on, for every k that there is room for

bf16 and f32: input by input, the weights of the 16 rows.

Everything here is (n_tiles, ...) uint8 and little-endian.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

LINEAR_LEVELS = tuple(range(-8, 8))
"""The equal steps of a Q4_0 block, as a codebook."""

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The codebook of a block of GGML's type IQ4_NL (llama.cpp, ggml-common.h, kvalues_iq4nl)."""

TILE_ROWS = 16
RUN_INPUTS = 32
"""Inputs in one full run of a block; also the inputs that share an activation scale."""

PLANE_BITS = (2, 1, 1, 4)
"""Bits of a code in each plane."""

SLAB_TILES = 64
"""Tiles whose first planes lie together, and then their second ones, and so on."""

_LOOKED_AT = 16
"""Tiles, all over the matrix, that `remainders` looks at."""

LARGEST_BFLOAT16 = np.float32(2**128 - 2**120)

INT4_FORMATS = ("int4", "int4_dq")
CODE_FORMATS = (*INT4_FORMATS, "int8", "int8_planes")
FORMATS = (*CODE_FORMATS, "bf16", "f32")
_CODE_BYTES = {"int4": 256, "int4_dq": 256, "int8": 512, "int8_planes": 512}
"""For 32 inputs of 16 rows."""

_FLOAT_BYTES = {"bf16": 2, "f32": 4}
UNIT_BYTES = 2 * TILE_ROWS
"""Of the units that open a tile of int4_dq."""


_Number = TypeVar("_Number", bound=np.generic)


class DoubleScales(NamedTuple):
    """Scales of int4_dq: a group's is `codes * units`."""

    codes: NDArray[np.int8]  # (n_rows, n_groups)
    units: NDArray[np.float32]  # (n_rows,), of values that bfloat16 has


Scales = NDArray[np.float16] | DoubleScales
"""One scale for each group of a row, (n_rows, n_groups)."""


def n_tiles(n_out: int) -> int:
    return -(-n_out // TILE_ROWS)


def scale_bytes(fmt: str) -> int:
    """Bytes of the scales that open a block."""
    return TILE_ROWS if fmt == "int4_dq" else 2 * TILE_ROWS


def block_bytes(fmt: str, group_size: int) -> int:
    """Bytes of one group's block of a tile of codes; in planes, of both together."""
    return scale_bytes(fmt) + group_size // RUN_INPUTS * _CODE_BYTES[fmt]


def tile_bytes(fmt: str, n_in: int, group_size: int) -> int:
    if fmt in _FLOAT_BYTES:
        return TILE_ROWS * n_in * _FLOAT_BYTES[fmt]
    units = UNIT_BYTES if fmt == "int4_dq" else 0
    return units + n_in // group_size * block_bytes(fmt, group_size)


def _whole_tiles(rows: NDArray[_Number]) -> NDArray[_Number]:
    missing = -len(rows) % TILE_ROWS
    if not missing:
        return rows
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])


def _runs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n_rows, n_in) bytes -> (n_tiles, n_in / 32, 8, 64), run by run."""
    # The 4 inputs of a row that lie side by side move as one uint32.
    fours = codes.view(np.uint32).reshape(-1, TILE_ROWS, codes.shape[1] // RUN_INPUTS, 8)
    return np.ascontiguousarray(fours.transpose(0, 2, 3, 1)).view(np.uint8)


def _rows(runs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reverse of _runs."""
    fours = runs.view(np.uint32).transpose(0, 3, 1, 2)
    rows = np.ascontiguousarray(fours).view(np.uint8)
    return rows.reshape(len(runs) * TILE_ROWS, -1)


def _pack(runs: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Runs of 32 inputs' codes of so many bits, (..., 8, 64), to (..., bits, 64) bytes."""
    parts = np.split(runs, 8 // bits, axis=-2)
    packed = parts[0].copy()
    for k, part in enumerate(parts[1:], 1):
        packed |= part << np.uint8(bits * k)
    return packed


def _unpack(bytes_: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The reverse of _pack, of bytes that are a whole number of runs, to (n_runs, 8, 64)."""
    packed = bytes_.reshape(-1, bits, 64)
    parts = [packed >> np.uint8(shift) for shift in range(0, 8, bits)]
    return np.concatenate(parts, axis=-2) & np.uint8((1 << bits) - 1)


def _slabs(n: int) -> list[slice]:
    return [slice(i, min(i + SLAB_TILES, n)) for i in range(0, n, SLAB_TILES)]


def pack_codes(
    fmt: str, codes: NDArray[np.uint8] | NDArray[np.int8], scales: Scales
) -> NDArray[np.uint8]:
    """Codes and scales of whole rows -> tiles (n_tiles, tile_bytes).

    codes: (n_rows, n_in), uint8 0 to 15 for int4 and int4_dq, else int8; scales: DoubleScales for
    int4_dq, else float16 (n_rows, n_groups). For int8_planes, whole slabs of rows, or what is left.
    """
    whole = _whole_tiles(codes)
    if fmt in INT4_FORMATS:
        body = _pack(_runs(whole.view(np.uint8)), 4)
    else:
        body = _runs(np.bitwise_xor(whole.view(np.uint8), np.uint8(128)))
    if fmt == "int8_planes":
        body, *others = _split(body)
    group_scales = scales.codes if isinstance(scales, DoubleScales) else scales
    n_groups, first = group_scales.shape[1], scale_bytes(fmt)
    whole_scales = _whole_tiles(group_scales).reshape(-1, TILE_ROWS, n_groups).transpose(0, 2, 1)
    tiles = len(whole_scales)
    blocks = np.empty((tiles, n_groups, first + body[0].size // n_groups), np.uint8)
    blocks[..., :first] = np.ascontiguousarray(whole_scales).view(np.uint8)
    blocks[..., first:] = body.reshape(tiles, n_groups, -1)
    packed = blocks.reshape(tiles, -1)
    if isinstance(scales, DoubleScales):
        units = to_bfloat16(_whole_tiles(scales.units)).view(np.uint8)
        return np.hstack([units.reshape(tiles, -1), packed])
    if fmt != "int8_planes":
        return packed
    planes = [packed, *(plane.reshape(tiles, -1) for plane in others)]
    parts = [plane[slab].ravel() for slab in _slabs(tiles) for plane in planes]
    return np.concatenate(parts).reshape(tiles, -1)


def unpack_codes(
    fmt: str, tiles: NDArray[np.uint8], n_in: int, group_size: int
) -> tuple[NDArray[np.uint8] | NDArray[np.int8], Scales]:
    """The reverse of pack_codes, with the filled-up rows: (16 n_tiles, n_in) and their scales."""
    n_groups, first = n_in // group_size, scale_bytes(fmt)
    if fmt == "int8_planes":
        slabs = [_planes(tiles[slab], n_in) for slab in _slabs(len(tiles))]
        tiles, *others = (np.concatenate(plane) for plane in zip(*slabs, strict=True))
    elif fmt == "int4_dq":
        units = np.ascontiguousarray(tiles[:, :UNIT_BYTES]).view(np.uint16).ravel()
        tiles = tiles[:, UNIT_BYTES:]
    blocks = tiles.reshape(len(tiles), n_groups, -1)
    stored = np.ascontiguousarray(blocks[..., :first])
    scales: Scales
    if fmt == "int4_dq":
        scales = DoubleScales(_by_row(stored.view(np.int8)), from_bfloat16(units))
    else:
        scales = _by_row(stored.view(np.float16))
    body = blocks[..., first:]
    if fmt in INT4_FORMATS:
        runs = _unpack(body, 4)
    elif fmt == "int8":
        runs = body
    else:
        runs = _join([body, *others])
    codes = _rows(runs.reshape(len(tiles), n_in // RUN_INPUTS, 8, 64))
    return codes if fmt in INT4_FORMATS else (codes ^ np.uint8(128)).view(np.int8), scales


def _by_row(scales: NDArray[_Number]) -> NDArray[_Number]:
    """(n_tiles, n_groups, 16) -> (16 n_tiles, n_groups)."""
    return scales.transpose(0, 2, 1).reshape(-1, scales.shape[1])


def scale_values(scales: Scales) -> NDArray[np.float32]:
    """What scales are worth, (n_rows, n_groups); exact."""
    if isinstance(scales, DoubleScales):
        return scales.codes * scales.units[:, None]
    return scales.astype(np.float32)


def _split(runs: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Runs of 32 inputs' bytes, (..., 8, 64), to planes, (..., bits, 64) each."""
    planes, below = [], 8
    for bits in PLANE_BITS:
        below -= bits
        planes.append(_pack(runs >> np.uint8(below) & np.uint8((1 << bits) - 1), bits))
    return planes


def _join(planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The reverse of _split, to (n_runs, 8, 64); of the last planes alone, what they hold."""
    first, *others = zip(planes, PLANE_BITS[-len(planes) :], strict=True)
    runs = _unpack(*first)
    for plane, bits in others:
        runs = runs << np.uint8(bits) | _unpack(plane, bits)
    return runs


def _planes(slab: NDArray[np.uint8], n_in: int) -> list[NDArray[np.uint8]]:
    """The planes of a slab's tiles, (n_tiles, ...) each, the first with scales."""
    others = [bits * 2 * n_in for bits in PLANE_BITS[1:]]
    first = slab.shape[1] - sum(others)
    ends = len(slab) * np.cumsum([first, *others[:-1]])
    return [plane.reshape(len(slab), -1) for plane in np.split(slab.ravel(), ends)]


def remainders(tiles: NDArray[np.uint8], n_in: int) -> NDArray[np.float64]:
    """What a code's bits are worth that the first plane leaves, the first two, and the first three.

    tiles: of a whole matrix in int8_planes, of which some are looked at -> (3, 2), each time the
    mean and the variance.
    """
    slabs = _slabs(len(tiles))
    some = slabs[:: -(-len(slabs) // _LOOKED_AT)]
    each = -(-_LOOKED_AT // len(some))
    planes = [[plane[:each] for plane in _planes(tiles[slab], n_in)[1:]] for slab in some]
    others = [np.concatenate(plane) for plane in zip(*planes, strict=True)]
    values = [_join(others[i:]) for i in range(len(others))]
    return np.array([(value.mean(), value.var()) for value in values])


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even.

    Values are finite and stay so: those beyond bfloat16's largest become that.
    """
    bits = np.clip(values, -LARGEST_BFLOAT16, LARGEST_BFLOAT16).view(np.uint32)
    bits += (bits >> np.uint32(16)) & np.uint32(1)
    bits += np.uint32(0x7FFF)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_floats(fmt: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Whole rows (n_rows, n_in) -> bf16 or f32 tiles (n_tiles, tile_bytes)."""
    values = to_bfloat16(rows) if fmt == "bf16" else rows
    whole = _whole_tiles(values)
    tiles = whole.reshape(-1, TILE_ROWS, rows.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(len(tiles), -1)


def unpack_floats(fmt: str, tiles: NDArray[np.uint8], n_in: int) -> NDArray[np.float32]:
    """The reverse of pack_floats, with the filled-up rows: (16 n_tiles, n_in)."""
    dtype = np.uint16 if fmt == "bf16" else np.float32
    values = tiles.view(dtype).reshape(len(tiles), n_in, TILE_ROWS).transpose(0, 2, 1)
    rows = np.ascontiguousarray(values).reshape(-1, n_in)
    return from_bfloat16(rows) if fmt == "bf16" else rows
