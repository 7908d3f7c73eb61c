"""Style of all figures, and their output as files or inline SVG.

One unit of a figure is one CSS pixel (72 dots per inch, one point a dot), so a font size of 12 is 12 px on the page.
Inks are plain colors in a file; inside a page `inline_svg` turns them into CSS variables, so that one picture serves
the light and the dark mode.
"""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, to_rgb, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, GRID, PANEL = "#1c2531", "#566172", "#dbe0e8", "#fefefd"
ACCENT, WARM = "#2f6fdd", "#d2680c"
COLORS = (ACCENT, WARM, "#1d9367", "#c8446a", "#8a5cd0", "#148fa8", "#9a8410", "#7b6a5c")
"""Line colors, at least 3:1 against the light and the dark panel."""
MORE_COLORS = ("#b03fc4", "#5a8f00", "#d13b2f", "#64707f", "#a8622a", "#007f7a", "#5f6fe0", "#d0479a")
"""Colors of further lines, where one figure has more than `COLORS`."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PANEL: "--panel"}
_DARK = {INK: "#e6eaf0", MUTED: "#a2adbb", GRID: "#333d4b", PANEL: "#1a2029"}
"""What the variables are in dark mode, in `report.css`."""
_MARKERS = "osD^vPX*<>hp"
_FONT = 12.0
CURVE = (430.0, 310.0)
"""Width and height of a picture that stands beside another, and is still readable on a telephone."""


def new_figure(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Return a figure of `width` × `height` CSS pixels with one pair of axes in the house look."""
    figure = _new_canvas(width, height)
    return figure, _styled(figure.add_subplot(), title)


def new_panels(
    width: float, height: float, titles: Sequence[str], columns: int, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` × `height` CSS pixels with one pair of axes a title, `columns` of them in a row.

    Args:
        width: Of the whole figure.
        height: Of the whole figure.
        titles: One a panel.
        columns: Panels in a row.
        subplots: Further arguments of `Figure.subplots`, such as `sharey="row"`.
    """
    figure = _new_canvas(width, height)
    grid = figure.subplots(-(-len(titles) // columns), columns, squeeze=False, **subplots).flat
    panels = [_styled(axes, title) for axes, title in zip(grid, titles, strict=False)]
    for axes in list(grid)[len(titles) :]:
        axes.remove()
    return figure, panels


def _new_canvas(width: float, height: float) -> Figure:
    """An empty figure."""
    figure = Figure(
        figsize=(width / 72, height / 72),
        dpi=72,
        layout=ConstrainedLayoutEngine(h_pad=5 / 72, w_pad=5 / 72),
        facecolor=PANEL,
    )
    FigureCanvasAgg(figure)
    return figure


def _styled(axes: Axes, title: str) -> Axes:
    """Axes in the house look."""
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


def style_of(number: int) -> tuple[str, str]:
    """Color and marker of the line of this number: 16 colors, then markers tell lines of one color apart."""
    colors = (*COLORS, *MORE_COLORS)
    return colors[number % len(colors)], _MARKERS[(number + number // len(COLORS)) % len(_MARKERS)]


def epoch_axis(axes: Axes, label: str = "epoch") -> None:
    """Label the x axis, with ticks at whole numbers only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def percent_axis(axes: Axes, which: Literal["x", "y", "both"] = "y") -> None:
    """Show the values of an axis, shares, as percentages."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in (name, "both"):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 3):g}\N{NO-BREAK SPACE}%"))


def add_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], columns: int = 3) -> None:
    """Put a legend below the axes, where it hides no line."""
    if handles:
        legend = figure.legend(
            handles,
            [str(i) for i in range(len(handles))],  # the names come below: here a leading underscore would hide one
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
    """Return the color map from nothing (transparent, so the page shows through) to the full accent."""
    red, green, blue = to_rgb(ACCENT)
    return ListedColormap([(red, green, blue, 0.04 + 0.96 * i / 255) for i in range(256)], name="accent")


def signed_map() -> ListedColormap:
    """Return the color map from negative (orange) over nothing (transparent) to positive (blue)."""
    shades = np.linspace(-1, 1, 257)
    colors = [(*to_rgb(ACCENT if shade > 0 else WARM), float(abs(shade)) ** 0.7) for shade in shades]
    return ListedColormap(colors, name="signed")


def scale_bar(figure: Figure, axes: Axes, label: str, ticks: dict[float, str]) -> None:
    """Draw the accent's color scale below the axes, `ticks` naming some of its values in [0, 1]."""
    width, height = figure.get_size_inches() * 72
    shrink = min(0.5, 260 / width)
    bar = figure.colorbar(
        ScalarMappable(cmap=accent_map()), ax=axes, location="bottom", shrink=shrink, aspect=26, pad=12 / height
    )
    if bar.solids is not None:
        bar.solids.set_visible(False)  # one smooth picture instead of 256 rectangles with visible seams
    bar.ax.imshow(
        accent_map()(np.linspace(0, 1, 256)[None]), extent=(0, 1, 0, 1), aspect="auto", interpolation="none", zorder=0
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=_FONT - 1, length=3)
    bar.ax.set_facecolor("none")
    bar.outline.set(edgecolor=MUTED, linewidth=0.8)
    bar.set_label(label, color=INK, fontsize=_FONT - 1)


def text_on(share: float) -> str:
    """Return the color of a text on a cell of the accent's color map, legible in both modes."""
    return "#ffffff" if share > 0.85 else INK


def shortened(text: str, length: int = 18) -> str:
    """Cut a label in the middle to `length` characters; line breaks and what a picture cannot show are replaced."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    text = text if len(text) <= length else text[: length - length // 3 - 1] + "…" + text[-(length // 3) :]
    return text.replace("$", r"\$")  # Matplotlib would read what lies between two dollar signs as mathematics


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as `.svg` or `.png` (two dots a pixel) atomically.

    Raises:
        ValueError: The ending is another.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"a figure is written as .svg or .png, got {path.name!r}; rename it")
    data = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(data, format=path.suffix[1:], dpi=144, metadata=metadata)
    write_atomically(path, data.getvalue())
    return path


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as `NAME.svg` and `NAME.png`, and for dark pages as `NAME-dark.svg` and `NAME-dark.png`.

    Args:
        figure: Drawn in the inks of this module; in those of dark mode afterwards.
        folder: Must be there.
        name: Stem of the files.
    """
    light = [save_figure(figure, folder / f"{name}{ending}") for ending in (".svg", ".png")]
    darken(figure)
    return [*light, *(save_figure(figure, folder / f"{name}-dark{ending}") for ending in (".svg", ".png"))]


def darken(figure: Figure) -> None:
    """Exchange the inks of a figure for those of dark mode, in place; other colors suit both."""
    figure.draw_without_rendering()  # makes the ticks
    inks = {to_rgb(light): to_rgb(dark) for light, dark in _DARK.items()}
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            value = getattr(artist, f"get_{name}", lambda: "none")()
            if isinstance(value, str) and value in ("none", "auto"):
                continue
            colors = to_rgba_array(value)
            changed = [(*inks.get(tuple(color[:3].tolist()), color[:3]), color[3]) for color in colors]
            if len(colors) and not np.array_equal(colors, changed):
                getattr(artist, f"set_{name}")(changed if len(changed) > 1 else to_rgba(changed[0]))


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure as an `<svg>` element for an HTML page; what comes from the run is escaped.

    Texts stay texts in the page's font, inks follow the page's variables `--ink`, `--muted`, `--line` and `--panel`.

    Args:
        figure: The figure.
        name: Unique in the page, of letters, digits and hyphens; prefix of all ids.
        description: Alternative text.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser has the characters that Matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"""font-family: [^;"]+""", "font-family: var(--font)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    width, height = (figure.get_size_inches() * 72).round().astype(int).tolist()
    head = (
        f'<svg class="figure" role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width} {height}" '
        f'style="--w: {width}px" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
