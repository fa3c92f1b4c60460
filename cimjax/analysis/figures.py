"""Figures as a paper prints them: axes with units, told apart in grey by markers, as SVG and as PNG.

matplotlib is imported when a figure is made; jax is not imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cimjax.training.run.files import in_one_line

# Okabe and Ito's colours without yellow, which is too light for a line; markers tell more runs apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Inches; 900 pixels wide where a figure is shown at 100 per inch, and twice as sharp.
WIDTH, HEIGHT, DPI = 9.0, 3.7, 200


def require_matplotlib() -> None:
    """Refuse to start what ends in a figure where none can be drawn.

    Raises:
      ValueError: in one line.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'cimjax[plot]'.") from error


def panels(columns: int = 1, rows: int = 1, *, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    """A figure of `WIDTH` and its panels, row by row; each is `height` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, [plain(axes) for axes in figure.subplots(rows, columns, squeeze=False).flat]


def plain(axes: Any) -> Any:
    """The axes with a light grid and without a frame."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def logarithmic(axes: Any) -> None:
    """A logarithmic horizontal axis whose numbers are written out, at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=9)


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th of some curves, as matplotlib's `plot` and `errorbar` take them."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def save(figure: Any, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as `NAME.svg` and `NAME.png`, which are replaced.

    Raises:
      ValueError: in one line, where the folder cannot be written.
    """
    files = [Path(folder) / f"{name}.{kind}" for kind in ("svg", "png")]
    with in_one_line("write", Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            # The same figure is the same file: no date, and ids that do not change.
            from matplotlib import rc_context

            with rc_context({"svg.hashsalt": "cimjax", "svg.fonttype": "none"}):
                metadata = {"Date": None} if file.suffix == ".svg" else {}
                figure.savefig(file, dpi=DPI, metadata=metadata)
    return files
