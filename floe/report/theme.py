"""Style, drawing helpers and rendering of the figures: deterministic, without pyplot."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 10.4  # inches; 998 CSS pixels, the width of the page's figure column
PNG_DPI = 144
DASHED = (0, (4, 3))

# The page's own fonts: the browser sets the text of an SVG, so it matches the page.
FONTS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, "
    "'Liberation Sans', 'DejaVu Sans', sans-serif"
)


@dataclass(frozen=True)
class Theme:
    """One colour scheme: hues after Okabe and Ito, lightened on dark paper; maps by lightness."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    faint: str
    chosen: str
    contrast: str
    others: tuple[str, ...]
    ramp: tuple[str, ...]

    @property
    def colormap(self) -> Colormap:
        """Single-hue map from the paper's side (small) to the ink's side (large)."""
        return LinearSegmentedColormap.from_list(f"floe-{self.name}", self.ramp)


LIGHT = Theme(
    name="light",
    paper="#fdfdfb",
    ink="#1c2127",
    muted="#5d6670",
    grid="#e4e5e2",
    faint="#cdd1d3",
    chosen="#0068a8",
    contrast="#c8500a",
    others=("#00805f", "#a4497f", "#8a6d00", "#5b58b0", "#7a4a2a"),
    ramp=("#f1f3f1", "#cfdfe8", "#92bbd3", "#4a8ab5", "#1d5a8c", "#0c2f55"),
)
DARK = Theme(
    name="dark",
    paper="#14171a",
    ink="#e8e9e6",
    muted="#a0a8b0",
    grid="#2c3136",
    faint="#454c53",
    chosen="#5cb6f2",
    contrast="#f58e4e",
    others=("#2fbf97", "#df8fbd", "#e0b93a", "#a5a2f0", "#c99877"),
    ramp=("#1e242a", "#20405a", "#2d6690", "#4f93c2", "#93c5e6", "#e3f2fc"),
)

Draw = Callable[[Theme], Figure]


def new_figure(height: float) -> Figure:
    """An empty figure of the page's width, laid out by constraint; ``height`` in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def bare(ax: Any, axis: Literal["x", "y", "both"] = "both") -> None:
    """Hide the frame, and the ticks of ``axis``."""
    ax.spines[:].set_visible(False)
    ax.tick_params(axis=axis, length=0)


def tiles(
    ax: Any, shape: tuple[int, int], theme: Theme, rows: float = 1.4, columns: float = 1.4
) -> None:
    """Lines of paper between the rows and columns of a map, of so many points, and no frame."""
    for edge in range(1, shape[0]):
        ax.axhline(edge - 0.5, color=theme.paper, linewidth=rows)
    for edge in range(1, shape[1]):
        ax.axvline(edge - 0.5, color=theme.paper, linewidth=columns)
    ax.spines[:].set_visible(False)


def colorbar(figure: Figure, shades: Any, ax: Any, label: str = "", **place: Any) -> Any:
    """The scale of a map beside it, without a frame."""
    bar = figure.colorbar(shades, ax=ax, **place)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return bar


def note(
    ax: Any, text: str, at: tuple[float, float], by: tuple[float, float], **style: Any
) -> None:
    """Text ``by`` so many points beside the place ``at``."""
    ax.annotate(text, at, xytext=by, textcoords="offset points", **style)


def legend_below(figure: Figure, count: int, *entries: Any) -> None:
    """The legend of ``count`` entries under all panels, in at most seven columns."""
    figure.legend(*entries, loc="outside lower center", ncols=min(7, count))


def whole_numbers(ax: Any, **options: Any) -> None:
    """Ticks of the x axis at whole numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, **options))


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """matplotlib settings of ``theme``, for the length of one drawing."""
    settings: dict[str, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.4,
        "axes.titlesize": 8.8,
        "axes.titlelocation": "left",
        "axes.titlepad": 9.0,
        "axes.labelsize": 8.4,
        "xtick.labelsize": 7.8,
        "ytick.labelsize": 7.8,
        "legend.fontsize": 8.0,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.axisbelow": True,
        "xtick.major.size": 3.0,
        "ytick.major.size": 3.0,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "text.parse_math": False,
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.facecolor": "none",
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "svg.fonttype": "none",
        "svg.hashsalt": "floe",
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # DejaVu lacks some scripts; the browser's fonts have them, and the PNG shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def render_svg(draw: Draw, theme: Theme) -> str:
    """The picture as an SVG document with no metadata, no DTD and no outside reference."""
    with themed(theme):
        return _svg(draw(theme))


def render_both(draw: Draw, theme: Theme) -> tuple[str, bytes]:
    """The picture as SVG, and as PNG at ``PNG_DPI`` without software or date fields."""
    with themed(theme):
        figure = draw(theme)
        svg = _svg(figure)
        figure.set_layout_engine("none")  # keep the layout just computed
        buffer = io.BytesIO()
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return svg, buffer.getvalue()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"font-family: (?:&quot;|')?DejaVu Sans(?:&quot;|')?", f"font-family: {FONTS}", text
    )
    return re.sub(r"\n\s*", "\n", text)
