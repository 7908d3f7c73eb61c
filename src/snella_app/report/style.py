"""Figure style, and output as inline SVG.

One figure unit is one CSS pixel (72 dots per inch), so font size 12 is 12 px on the page. Figures are drawn with fixed
colors, which `inline_svg` replaces with CSS variables, so that one figure serves both light and dark mode.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK = "#1c2531"
MUTED = "#566172"
GRID = "#dbe0e8"
PANEL = "#fefefd"
ACCENT = "#2f6fdd"
WARM = "#d2680c"
COLORS = (ACCENT, WARM, "#1d9367", "#c8446a", "#8a5cd0", "#148fa8", "#9a8410", "#7b6a5c")
"""Line colors with a contrast of at least 3:1 against the light and the dark panel."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PANEL: "--panel"}
"""CSS variables by the color that they replace."""
_FONT = 12.0  # font size in pixels
FIGURE_SIZE = (430.0, 310.0)
"""Width and height in pixels of figures that are placed side by side and stay readable on a phone."""
DASHED = (0, (4, 3))
"""Line style of reference lines and limits."""


def new_figure(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Return a styled figure of `width` × `height` CSS pixels with one `Axes`."""
    figure = _new_canvas(width, height)
    return figure, _styled(figure.add_subplot(), title)


def new_panels(
    width: float, height: float, titles: Sequence[str], columns: int, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Return a styled figure of `width` × `height` CSS pixels with one panel per title.

    `subplots` are passed to `Figure.subplots`.
    """
    figure = _new_canvas(width, height)
    grid = list(figure.subplots(-(-len(titles) // columns), columns, squeeze=False, **subplots).flat)
    for axes in grid[len(titles) :]:
        axes.remove()
    return figure, [_styled(axes, title) for axes, title in zip(grid, titles, strict=False)]


def _new_canvas(width: float, height: float) -> Figure:
    """Return an empty figure of `width` × `height` CSS pixels."""
    figure = Figure(
        figsize=(width / 72, height / 72),
        dpi=72,
        layout=ConstrainedLayoutEngine(h_pad=5 / 72, w_pad=5 / 72),
        facecolor=PANEL,
    )
    FigureCanvasAgg(figure)
    return figure


def _styled(axes: Axes, title: str) -> Axes:
    """Apply the figure style to axes, and return them."""
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=_FONT - 1, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=INK, fontsize=_FONT)
    axes.yaxis.label.set(color=INK, fontsize=_FONT)
    if title:
        axes.set_title(title, color=INK, fontsize=_FONT + 1, fontweight="bold", loc="left", x=0.0, pad=10)
    return axes


def plot_line(axes: Axes, x: Sequence[float], y: Sequence[float], color: str) -> list[Line2D]:
    """Plot a line, with a marker at each point if there are at most 30 points."""
    return axes.plot(x, y, color=color, linewidth=2, marker="o" if len(x) <= 30 else "", markersize=4)


def integer_axis(axes: Axes, label: str) -> None:
    """Label the x-axis and use integer ticks."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def percent_axis(axes: Axes, which: Literal["x", "y", "both"] = "y") -> None:
    """Format axis values in [0, 1] as percentages."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in (name, "both"):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 3):g}%"))


def add_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], columns: int = 3) -> None:
    """Add a legend below the axes."""
    if handles:
        legend = figure.legend(
            handles,
            [str(i) for i in range(len(handles))],  # replaced below: Matplotlib hides labels with a leading "_"
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=_FONT - 1,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.2,
        )
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_text(label)


def accent_map() -> ListedColormap:
    """Return the color map from nearly transparent to the accent color."""
    red, green, blue = to_rgb(ACCENT)
    return ListedColormap([(red, green, blue, 0.04 + 0.96 * i / 255) for i in range(256)], name="accent")


def signed_map() -> ListedColormap:
    """Return the color map from negative (orange) through zero (transparent) to positive (blue)."""
    colors: list[tuple[float, float, float, float]] = []
    for shade in np.linspace(-1, 1, 257):
        red, green, blue = to_rgb(ACCENT if shade > 0 else WARM)
        opacity = float(abs(shade)) ** 0.7
        colors.append((red, green, blue, opacity))
    return ListedColormap(colors, name="signed")


def scale_bar(figure: Figure, axes: Axes, label: str, ticks: dict[float, str]) -> None:
    """Draw the accent color scale below the axes; `ticks` maps values in [0, 1] to their labels."""
    width, height = figure.get_size_inches() * 72
    shrink = min(0.5, 260 / width)
    bar = figure.colorbar(
        ScalarMappable(cmap=accent_map()), ax=axes, location="bottom", shrink=shrink, aspect=26, pad=12 / height
    )
    if bar.solids is not None:
        bar.solids.set_visible(False)  # its 256 rectangles show seams; an image has none
    bar.ax.imshow(
        accent_map()(np.linspace(0, 1, 256)[None]), extent=(0, 1, 0, 1), aspect="auto", interpolation="none", zorder=0
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=_FONT - 1, length=3)
    bar.ax.set_facecolor("none")
    bar.outline.set(edgecolor=MUTED, linewidth=0.8)
    bar.set_label(label, color=INK, fontsize=_FONT - 1)


def text_on(share: float) -> str:
    """Return a text color that is legible on a cell of the accent color map in light and dark mode."""
    return "#ffffff" if share > 0.85 else INK


def shortened(text: str, length: int = 18) -> str:
    """Cut the middle of a label longer than `length` characters; replace line breaks and unprintable characters."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) > length:
        end_length = length // 3
        text = text[: length - end_length - 1] + "…" + text[-end_length:]
    return text.replace("$", r"\$")  # Matplotlib parses $...$ as math


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure as an `<svg>` element for an HTML page, with escaped text.

    Text uses the font of the page. Colors follow the CSS variables `--ink`, `--muted`, `--line`, and `--panel`.

    Args:
        figure: Figure to convert.
        name: Prefix of all IDs. It must be unique on the page and consist of letters, digits, and hyphens.
        description: Alternative text.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # text is not drawn with Matplotlib's font, so missing glyphs do not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    referenced_ids = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))

    def with_prefix(attribute: re.Match[str]) -> str:
        """Return the `id` attribute with the prefix, or an empty string if nothing refers to this ID."""
        if attribute[1] not in referenced_ids:
            return ""
        return f' id="{name}-{attribute[1]}"'

    svg = re.sub(r' id="([^"]+)"', with_prefix, svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"""font-family: [^;"]+""", "font-family: var(--font)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    width, height = (figure.get_size_inches() * 72).round().astype(int).tolist()
    opening_tag = (
        f'<svg class="figure" role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width} {height}" '
        f'style="--w: {width}px" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening_tag, svg, count=1))
