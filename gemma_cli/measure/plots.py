"""Figures of what quantizing has cost, drawn by matplotlib, which comes with the extra `plot`."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantize.errors import GemmaError
from quantize.modelfile import TensorError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")

_STYLE: dict[Any, object] = {
    "svg.fonttype": "none",  # Text stays text, which can be searched.
    "svg.hashsalt": "gemma-cli",  # The same figure, the same bytes.
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_SMALLEST = 1e-7
"""Where a divergence of 0 is shown: what is smaller, float32 logits do not tell from it."""


class Point(NamedTuple):
    name: str
    bits_per_weight: float
    kl: float
    kl_stderr: float
    series: str = ""
    """What made it: the points of a series look alike, and there is a legend."""


def require() -> None:
    """Raises GemmaError if nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401, PLC0415
    except ImportError:
        raise GemmaError(
            "A plot needs matplotlib: install it with `pip install 'gemma-cli[plot]'`."
        ) from None


def plot_errors(path: Path, title: str, errors: Mapping[str, TensorError]) -> None:
    """Draws each matrix's weighted error over the layers, a line for each kind of matrix.

    path: with a suffix of SUFFIXES; an existing file is replaced. Raises OSError.
    """
    kinds: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        if name.startswith("layers."):
            _, layer, kind = name.split(".")
            kinds.setdefault(kind, {})[int(layer)] = 100 * error.weighted
    with _axes(path, title) as axes:
        for kind, marker in zip(kinds, "ov^<>sDPX", strict=False):
            axes.plot(
                list(kinds[kind]), list(kinds[kind].values()), label=kind, marker=marker, ms=4
            )
        embed = 100 * errors["embed"].weighted
        axes.axhline(embed, label="embed", color="black", linestyle="--")
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error, weighted by inputs (%)")
        axes.set_ylim(bottom=0)
        axes.locator_params("x", integer=True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def plot_divergence(path: Path, title: str, points: Sequence[Point]) -> None:
    """Draws divergence against bits per weight, a labelled point with its standard error each.

    path: with a suffix of SUFFIXES; an existing file is replaced. Raises OSError.
    """
    all_series = list(dict.fromkeys(point.series for point in points))
    with _axes(path, title) as axes:
        for point in points:
            kl = max(point.kl, _SMALLEST)
            # Downwards no further than a logarithm goes.
            below, above = min(point.kl_stderr, 0.9 * kl), point.kl_stderr
            which = all_series.index(point.series)
            color = f"C{which}" if point.series else None
            at, error = (point.bits_per_weight, kl), [[below], [above]]
            axes.errorbar(*at, yerr=error, fmt="os^D"[which % 4], color=color, capsize=3)
            # Names of two series that are equally large do not lie on each other.
            to_left = which % 2 == 0 and bool(point.series)
            axes.annotate(
                point.name,
                at,
                xytext=(-8 if to_left else 8, 0),
                textcoords="offset points",
                horizontalalignment="right" if to_left else "left",
                verticalalignment="center",
                parse_math=False,
            )
        for which, series in enumerate(all_series):
            if series:
                axes.plot([], [], "os^D"[which % 4], color=f"C{which}", label=series)
                axes.legend(frameon=False)
        axes.set_yscale("log")
        axes.margins(0.25 if any(all_series) else 0.1, 0.1)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("KL divergence from the reference (nats)")


@contextmanager
def _axes(path: Path, title: str) -> Iterator[Axes]:
    """Axes to draw on, which are written to the file when the block ends well."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    drawn = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A name may have letters that the font lacks.
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, parse_math=False)  # A name may have a dollar sign.
        yield axes
        suffix = path.suffix.lower()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(drawn, format=suffix[1:], dpi=150, metadata=metadata, bbox_inches="tight")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(drawn.getvalue())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
