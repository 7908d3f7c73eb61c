"""Line styles for figures with many lines, and figure files for light and dark mode."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb, to_rgba, to_rgba_array
from matplotlib.figure import Figure

from snella_app.files import write_bytes
from snella_app.report.style import COLORS, GRID, INK, MUTED, PANEL

_LINE_COLORS = (*COLORS, "#b03fc4", "#5a8f00", "#d13b2f", "#64707f", "#a8622a", "#007f7a", "#5f6fe0", "#d0479a")
DARK = {INK: "#e6eaf0", MUTED: "#a2adbb", GRID: "#333d4b", PANEL: "#1a2029"}
"""Dark-mode color by light-mode color, as in `report.css`."""
_MARKERS = "osD^vPX*<>hp"


def style_of(number: int) -> tuple[str, str]:
    """Return the color and marker of line `number`. The first 176 lines have distinct combinations."""
    return _LINE_COLORS[number % len(_LINE_COLORS)], _MARKERS[(number + number // len(COLORS)) % len(_MARKERS)]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Atomically write a figure as `.svg` or `.png` (2× resolution)."""
    path = Path(path)
    data = io.BytesIO()
    # without a date and with a fixed salt, a figure always produces the same file
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(data, format=path.suffix[1:], dpi=144, metadata=metadata)
    write_bytes(path, data.getvalue())
    return path


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as `NAME.svg`, `NAME.png`, `NAME-dark.svg` and `NAME-dark.png`, and darken it in place."""
    light = [save_figure(figure, folder / f"{name}{suffix}") for suffix in (".svg", ".png")]
    darken(figure)
    dark = [save_figure(figure, folder / f"{name}-dark{suffix}") for suffix in (".svg", ".png")]
    return [*light, *dark]


def darken(figure: Figure) -> None:
    """Replace the light-mode colors of a figure with dark-mode colors in place."""
    figure.draw_without_rendering()  # creates the ticks
    dark_colors = {to_rgb(light): to_rgb(dark) for light, dark in DARK.items()}
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            value = getattr(artist, f"get_{name}", lambda: "none")()  # not every artist has every property
            if isinstance(value, str) and value in ("none", "auto"):
                continue
            colors = to_rgba_array(value)
            changed: list[Any] = []
            for color in colors:
                rgb, alpha = color[:3], color[3]
                new_rgb = dark_colors.get(tuple(rgb.tolist()), rgb)
                changed.append((*new_rgb, alpha))
            if len(colors) and not np.array_equal(colors, changed):
                # artists such as lines accept only a single color
                getattr(artist, f"set_{name}")(changed if len(changed) > 1 else to_rgba(changed[0]))
