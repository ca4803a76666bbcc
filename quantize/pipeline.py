"""The streaming conversion: one checkpoint in, one model file out, a few rows at a time."""

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from quantize import compensation, grouping, modelfile, packing, search
from quantize.checkpoint import Checkpoint, SourceTensor
from quantize.checkpoint.source import file_digest
from quantize.errors import GemmaError
from quantize.grid import find_grid
from quantize.modelfile import Description, MatrixSpec, ModelFile, Verification
from quantize.packing import IQ4_NL_LEVELS, LINEAR_LEVELS
from quantize.recipe import GROUP_SIZES, choose, rules_of
from quantize.statistics import Calibration
from quantize.tensors import matrix_shapes, norm_sizes

_PIECE_WEIGHTS = 1 << 18
"""Weights that a thread converts at a time: as float32 they stay in its L2 cache."""


_COMPENSATED_ROWS = 512
"""Rows that a thread compensates at a time: each time it reads all factors."""

_SAMPLE_WEIGHTS = 1 << 20  # of a matrix, for its codebook

Rounding = Callable[[NDArray[np.float32]], tuple[NDArray[Any], packing.Scales]]
"""Rows (n_rows, n_in) to codes and scales."""

_N_THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Progress:
    """How far a conversion is; bytes are those of the source."""

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    output: Path
    bits_per_weight: float
    bytes: int
    sha256: str
    seconds: float
    peak_rss_mb: float
    verification: Verification | None


@dataclass(frozen=True)
class PlannedTensor:
    """A matrix as it will be written; `exact`: the source's own codes and scales are kept."""

    name: str
    spec: MatrixSpec
    exact: bool


def _is_kept(tensor: SourceTensor, fmt: str, group_size: int) -> bool:
    """Whether the source's blocks go over code for code and scale for scale."""
    if group_size != packing.RUN_INPUTS:
        return False
    kept = {"int4_dq": ("Q4_0", "IQ4_NL")}.get(fmt, ("Q4_0", "Q5_0", "Q8_0", "I8"))
    return tensor.dtype in kept and tensor.grid(0, 1) is not None


def _begins_on_grid(tensor: SourceTensor, group_size: int) -> bool:
    """Whether the first row lies on a grid of 4 bits with float16 scales."""
    if group_size != packing.RUN_INPUTS or tensor.dtype not in ("BF16", "F16", "F32"):
        return False
    with np.errstate(all="ignore"):  # as in _rows, which reports it
        row = tensor.rows(0, 1)
    return bool(np.isfinite(row).all()) and find_grid(row, tensor.dtype) is not None


def plan(
    source: Checkpoint, bits: int, group_size: int = 32, recipe: str = "default"
) -> list[PlannedTensor]:
    """What every matrix becomes by a recipe (recipe.rules_of).

    Raises GemmaError for a recipe that cannot be used and a matrix that the groups do not fit.
    """
    rules = rules_of(recipe, bits, group_size)
    planned = []
    for name, (n_out, n_in) in matrix_shapes(source.config).items():
        tensor, (_, fmt, size) = source.tensors[name], choose(rules, name)
        grouped = fmt in packing.CODE_FORMATS
        if grouped and n_in % size:
            raise GemmaError(
                f"{source.path} has {n_in} inputs in {name}, which groups of {size} do not "
                f"divide; choose another --group-size (one of {', '.join(map(str, GROUP_SIZES))})."
            )
        exact = grouped and _is_kept(tensor, fmt, size)
        levels = IQ4_NL_LEVELS if exact and tensor.dtype == "IQ4_NL" else LINEAR_LEVELS
        codebook = levels if fmt == "int4_dq" else None
        if fmt == "int4_dq" and (exact or _begins_on_grid(tensor, size)):
            fmt = "int4"  # whose scales are the source's
        spec = MatrixSpec(fmt, n_out, n_in, size if grouped else 0, codebook)
        planned.append(PlannedTensor(name, spec, exact))
    return planned


def _finite(values: NDArray[np.float32], name: str, path: Path) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise GemmaError(
            f"{path} holds a value that is not a number or infinite in {name}; the checkpoint is "
            "damaged, get it again."
        )
    return values


def _rows(
    tensor: SourceTensor, name: str, path: Path, start: int, stop: int
) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):  # What comes of it is no finite number, and reported.
        rows = tensor.rows(start, stop)
    return _finite(rows, name, path)


def _tiles(
    tensor: SourceTensor,
    planned: PlannedTensor,
    path: Path,
    rounding: Rounding | None,
    rows_at: tuple[int, int],
) -> NDArray[np.uint8]:
    """Rows of a matrix, from one to before the other, as tiles; those of codes need a rounding."""
    spec, (start, stop) = planned.spec, rows_at
    if planned.exact:
        grid = tensor.grid(start, stop)
        if grid is None:
            raise ValueError(f"{planned.name} has no grid")
        _finite(grid.scales.astype(np.float32), planned.name, path)
        if spec.format != "int4":
            return packing.pack_codes(spec.format, grid.codes, grid.scales)
        # IQ4_NL's codes are indices already; Q4_0's are -8 to 7.
        first = 0 if tensor.dtype == "IQ4_NL" else 8
        return packing.pack_codes("int4", (grid.codes + first).astype(np.uint8), grid.scales)
    rows = _rows(tensor, planned.name, path, start, stop)
    if rounding:
        return packing.pack_codes(spec.format, *rounding(rows))
    return packing.pack_floats(spec.format, rows)


def _round_grid(rows: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.uint8], Any]:
    grid = find_grid(rows, dtype)
    if grid is None:
        raise ValueError("there is no grid")
    return (grid.codes + 8).astype(np.uint8), grid.scales


def _sample(tensor: SourceTensor, p: PlannedTensor, path: Path) -> NDArray[np.float32]:
    """Whole rows of a matrix, evenly spread."""
    n_rows = min(p.spec.n_out, max(1, _SAMPLE_WEIGHTS // p.spec.n_in))
    picked = np.arange(n_rows) * p.spec.n_out // n_rows
    return np.concatenate([_rows(tensor, p.name, path, int(i), int(i) + 1) for i in picked])


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool whose work, if the block fails, is given up rather than waited for."""
    pool = ThreadPoolExecutor(_N_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    convert: Callable[[tuple[int, int]], NDArray[np.uint8]],
    pieces: Iterable[tuple[int, int]],
) -> Iterator[NDArray[np.uint8]]:
    """What `convert` makes of each piece, in their order, a few ahead of the reader."""
    ahead: deque[Future[NDArray[np.uint8]]] = deque()
    for piece in pieces:
        ahead.append(pool.submit(convert, piece))
        if len(ahead) > 2 * _N_THREADS:
            yield ahead.popleft().result()
    for future in ahead:
        yield future.result()


def check_output(output: Path, source: Checkpoint, force: bool) -> None:
    """Raises GemmaError if `output` must not be written."""
    for path in (output, modelfile.partial_path(output)):
        if path.exists() and any(path.samefile(file) for file in (source.path, *source.files)):
            raise GemmaError(
                f"Writing {output} would destroy the checkpoint {source.path}; choose another "
                "output file."
            )
    if output.is_dir():
        raise GemmaError(f"{output} is a folder; give the name of a file in it.")
    if not output.exists():
        return
    if not force:
        raise GemmaError(f"{output} exists already; choose another name or add --force.")
    folder = source.path if source.path.is_dir() else source.path.parent
    if output.parent.samefile(folder) and not _is_model_file(output):
        raise GemmaError(
            f"{output} lies beside the checkpoint and is no model file, so it may belong to it; "
            "choose another output file."
        )


def _check_space(output: Path, description: Description) -> None:
    """Raises GemmaError if the disk has no room for the file."""
    n_tokenizer = len(description.tokenizer_model)
    needed = modelfile.data_bytes(description.config, n_tokenizer, description.matrices)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise GemmaError(
            f"{output} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; free "
            "some space or choose another output with -o."
        )


def _is_model_file(path: Path) -> bool:
    try:
        ModelFile.open(path)
    except GemmaError:
        return False
    return True


def quantize(
    source: Checkpoint,
    output: Path,
    *,
    bits: int,
    group_size: int = 32,
    recipe: str = "default",
    method: str = "search",
    calibration: Calibration | None = None,
    verify: Callable[[ModelFile], Verification] | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Converts a checkpoint to a model file at `output`, which appears when it is complete.

    bits: 4, 8, 16 or 32 a weight, as a recipe (recipe.rules_of) distributes them; method: of
    METHODS, "gptq" with a calibration that has gathered whole Gram matrices. Where a matrix lies on
    a 4-bit grid already, that is kept whatever the method. `verify` is given the file with all
    tensors in place, and what it says was lost is kept there. The same source and options give the
    same bytes, however many threads there are. Raises GemmaError when `output` exists without
    `force`, when it is (beside) the source, when the disk has no room for it, when a weight is not
    finite, or when the source changes meanwhile.
    """
    if method == "gptq" and calibration is None:
        raise ValueError("gptq without a calibration")
    started = time.perf_counter()
    planned = plan(source, bits, group_size, recipe)
    norms = norm_sizes(source.config)
    total = sum(source.tensors[name].nbytes for name in [*norms, *(p.name for p in planned)])
    groups = f", groups of {group_size}" if bits in (4, 8) else ""
    calibrated = ", calibrated" if calibration else ""
    how = f", {method}{calibrated}" if bits == 4 else ""
    description = Description(
        config=source.config,
        chat=source.chat,
        sampling=source.sampling,
        recipe=f"{Path(recipe).stem}, {bits} bits{groups}{how}",
        source=source.name,
        tokenizer_model=source.tokenizer_model,
        matrices={p.name: p.spec for p in planned},
    )
    done = 0

    def report(name: str, tensors_done: int, n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(Progress(name, tensors_done, len(norms) + len(planned), done, total))

    def pieces(p: PlannedTensor) -> list[tuple[int, int]]:
        n_out = p.spec.n_out
        whole = packing.TILE_ROWS * (packing.SLAB_TILES if p.spec.format == "int8_planes" else 1)
        step = max(1, _PIECE_WEIGHTS // p.spec.n_in // whole) * whole
        if calibration and p.spec.format in packing.INT4_FORMATS:
            step = max(step, _COMPENSATED_ROWS)
        return [(start, min(start + step, n_out)) for start in range(0, n_out, step)]

    def lies_on_grid(p: PlannedTensor) -> bool:
        tensor = source.tensors[p.name]

        def fits(rows_at: tuple[int, int]) -> bool:
            rows = _rows(tensor, p.name, source.path, *rows_at)
            return find_grid(rows, tensor.dtype) is not None

        return p.spec.format == "int4" and all(pool.map(fits, pieces(p)))

    def codebook(p: PlannedTensor, importance: NDArray[np.float32]) -> search.Levels:
        sample = _sample(source.tensors[p.name], p, source.path)
        return search.fit_codebook(sample, p.spec.group_size, importance)

    def rounding_of(p: PlannedTensor) -> Rounding | None:
        spec, tensor = p.spec, source.tensors[p.name]
        if p.exact or spec.format not in packing.CODE_FORMATS:
            return None
        if spec.format not in packing.INT4_FORMATS:
            return partial(grouping.round_int8, group_size=spec.group_size)
        if lies_on_grid(p):
            return partial(_round_grid, dtype=tensor.dtype)
        double = spec.format == "int4_dq"
        if method == "rtn":
            return partial(grouping.round_int4, group_size=spec.group_size, double=double)
        statistics = calibration(p.name) if calibration else None
        importance = statistics.mean_squares if statistics else np.ones(spec.n_in, np.float32)
        levels = fitted[p.name].result() if p.name in fitted else codebook(p, importance)
        writer.set_codebook(p.name, levels)
        if statistics is None:
            return partial(
                search.round_searched,
                group_size=spec.group_size,
                levels=levels,
                importance=importance,
                double=double,
            )
        return partial(
            compensation.round_compensated,
            group_size=spec.group_size,
            levels=levels,
            factors=[compensation.factorize(gram, spec.group_size) for gram in statistics.gram],
            double=double,
        )

    def parts(p: PlannedTensor, tensors_done: int) -> Iterator[NDArray[np.uint8]]:
        tensor = source.tensors[p.name]
        convert = partial(_tiles, tensor, p, source.path, rounding_of(p))
        cut = pieces(p)
        for (start, stop), tiles in zip(cut, _in_order(pool, convert, cut), strict=True):
            yield tiles
            report(p.name, tensors_done, tensor.nbytes // p.spec.n_out * (stop - start))

    try:
        check_output(output, source, force)
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output, description)
        with (
            # Pieces of a matrix are what runs side by side; a product that BLAS divided among
            # threads would depend on their number.
            threadpool_limits(1, "blas"),
            _threads() as pool,
            modelfile.create(output, description, to_be_verified=verify is not None) as writer,
        ):
            # Without a calibration, codebooks do not wait for their turn.
            fits = [p for p in planned if p.spec.format in packing.INT4_FORMATS and not p.exact]
            early = method == "search" and not calibration
            fitted = {
                p.name: pool.submit(codebook, p, np.ones(p.spec.n_in, np.float32))
                for p in fits
                if early
            }
            for i, name in enumerate(norms):
                source.check_unchanged()  # What is cut off could not even be read.
                with np.errstate(all="ignore"):  # as in _rows
                    values = source.tensors[name].values()
                writer.write(name, [_finite(values, name, source.path)])
                report(name, i + 1, source.tensors[name].nbytes)
            for i, p in enumerate(planned, len(norms)):
                source.check_unchanged()
                writer.write(p.name, parts(p, i))
            report(planned[-1].name, len(norms) + len(planned), total - done)
            verification = None
            if verify:
                writer.finish()
                verification = verify(ModelFile.open(modelfile.partial_path(output)))
                writer.set_verification(verification)
            source.check_unchanged()
        sha256 = file_digest(output)
    except OSError as error:
        raise GemmaError(
            f"{output} cannot be written ({error.strerror}); free some space or choose another "
            "output with -o."
        ) from error
    return Summary(
        output=output,
        bits_per_weight=description.bits_per_weight,
        bytes=output.stat().st_size,
        sha256=sha256,
        seconds=time.perf_counter() - started,
        peak_rss_mb=_peak_rss_mb(),
        verification=verification,
    )


def _peak_rss_mb() -> float:
    """The most memory that this process held, mapped files included; 0.0 where none can tell."""
    if sys.platform == "win32":
        return 0.0
    import resource  # noqa: PLC0415

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
