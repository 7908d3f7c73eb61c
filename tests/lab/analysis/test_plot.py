"""Plot files: names, tables, light and dark mode, and errors."""

import csv
from typing import get_args

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from snella_app.report.style import INK, PANEL, new_figure
from snella_lab.analysis.plot import (
    Kind,
    Plot,
    PlotOptions,
    csv_text,
    make_plots,
    plot_function,
    run_labels,
    write_plots,
)
from snella_lab.style import darken

ROWS = [{"layer": "0", "value": 0.1 + 0.2}, {"layer": "1", "value": float("nan"), "note": "a,b"}]


def draw():
    figure, axes = new_figure(200, 100, "title")
    axes.plot([0, 1], [0, 1], color=INK)
    return figure


def test_plot_is_written_as_four_images_and_csv_tables(tmp_path):
    paths = write_plots([Plot("one", ROWS, draw, tables={"more": ROWS[:1]})], tmp_path / "new")
    names = ["one.svg", "one.png", "one-dark.svg", "one-dark.png", "one.csv", "one-more.csv"]
    assert [path.name for path in paths] == names
    with (tmp_path / "new" / "one.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"layer": "0", "value": "0.30000000000000004", "note": ""},
            {"layer": "1", "value": "", "note": "a,b"},
        ]
    light, dark = (np.asarray(Image.open(tmp_path / "new" / name).convert("RGB")) for name in names[1:4:2])
    assert light[2, 2].min() > 250 and dark[2, 2].max() < 50
    assert light.min() < 60 and dark.max() > 200  # line color of each mode


def test_existing_files_are_replaced_only_with_overwrite(tmp_path):
    (tmp_path / "one.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already contains 'one\.csv'"):
        write_plots([Plot("one", ROWS, draw)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.csv"]
    write_plots([Plot("one", ROWS, draw)], tmp_path, overwrite=True)
    assert (tmp_path / "one.csv").read_text() == csv_text(ROWS)


def test_darken_replaces_all_light_mode_colors():
    figure, axes = new_figure(300, 200, "title")
    axes.bar([0, 1], [1, 2], color=INK)
    axes.fill_between([0, 1], [0, 1], color=PANEL)
    darken(figure)
    assert INK not in {text.get_color() for text in figure.findobj(Text)}
    assert axes.xaxis.label.get_color() == (230 / 255, 234 / 255, 240 / 255, 1.0)
    assert axes.patches[0].get_facecolor() == (230 / 255, 234 / 255, 240 / 255, 1.0)


def test_run_labels_are_the_shortest_unique_suffixes():
    assert run_labels(["a/x", "b/y"]) == ["x", "y"]
    assert run_labels(["a/x", "b/x"]) == ["a/x", "b/x"]
    assert run_labels(["a/x"]) == ["x"]


def test_a_run_that_is_passed_twice_is_rejected():
    with pytest.raises(ValueError, match=r"runs must be different folders, got \./a/x twice; pass each folder once"):
        run_labels(["a/x", "b/x", "./a/x"])


def test_every_plot_kind_has_a_function():
    for kind in get_args(Kind):
        assert plot_function(kind).__name__ == kind
    with pytest.raises(ValueError, match=r"kind must be one of allocation, .* got 'pie'"):
        PlotOptions(kind="pie", runs=["run"], out="plots")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0; batch_size must be at least 1, got -1"):
        PlotOptions(kind="images", runs=["run"], out="plots", limit=0, batch_size=-1)
    with pytest.raises(ValueError, match="--limit 3: not an option of snella plot radar"):
        make_plots(PlotOptions(kind="radar", runs=["run"], out="plots", limit=3))
