import dataclasses
import math
import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from snella_app.records.record import read
from snella_app.records.run import Allocation, AllocationStep, AveragedEpochs, MatrixInfo, Metrics
from snella_app.report import allocation as allocation_figures
from snella_app.report import figures
from snella_app.report.style import inline_svg, new_panels, shortened

XLINK = "{http://www.w3.org/1999/xlink}href"


def texts(svg):
    """Return all text of a well-formed SVG."""
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")]


def small_allocation(budgets, importance=None, total=2):
    """Allocation of two matrices with one step per pair in `budgets`."""
    matrices = [MatrixInfo(name, name, 0, (10, 10), 100, 100, 100) for name in ("q", "_k")]
    history = [
        AllocationStep(t, t, total, sum(pair), dict(zip(("q", "_k"), pair, strict=True)), importance or {})
        for t, pair in enumerate(budgets)
    ]
    return Allocation(200, 60, matrices, history)


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_every_figure_is_written_as_svg_and_png(run, tmp_path, ending, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have imported it
    run.finished()
    allocation, metrics = read(Allocation, run.folder), read(Metrics, run.folder)
    budgets = allocation.history[-1].budgets
    drawn = {
        "loss": figures.loss_curves(metrics),
        "accuracy": figures.score_curves(metrics, "accuracy"),
        "confusion": figures.confusion_matrix(metrics.val.confusion, ["defective", "sound"]),
        "map": allocation_figures.sparsity_map(allocation.matrices, budgets),
        "trend": allocation_figures.block_trend(allocation.matrices, budgets),
        "budget": allocation_figures.budget_curve(allocation, 10),
        "frozen": allocation_figures.frozen_curve(allocation, 10),
        "kind": allocation_figures.budget_shares(allocation, 10),
        "depth": allocation_figures.budget_shares(allocation, 10, by_block=True),
        "importance": allocation_figures.importance_curves(allocation, 10),
    }
    for name, figure in drawn.items():
        path = tmp_path / (name + ending)
        figure.savefig(path)
        if ending == ".png":
            with Image.open(path) as picture:
                assert len(set(picture.convert("L").tobytes())) > 20, f"{name} is blank"
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")
    assert "matplotlib.pyplot" not in sys.modules


def test_no_single_epoch_is_marked_if_an_average_is_saved(run):
    run.finished()
    metrics = read(Metrics, run.folder)
    assert "saved epoch" in texts(inline_svg(figures.loss_curves(metrics), "loss", "Loss"))
    for is_saved in (True, False):
        averaged = dataclasses.replace(metrics, averaged=AveragedEpochs("swa", [1, 2], [1, 2], is_saved, {}))
        shown = texts(inline_svg(figures.loss_curves(averaged), "loss", "Loss"))
        assert ("saved epoch" in shown) is not is_saved


def test_unused_panels_are_removed():
    figure, panels = new_panels(600, 400, ["a", "b", "c", "d"], 3)
    assert len(panels) == 4 and figure.axes == panels


def test_equal_figures_are_written_as_equal_bytes(run):
    run.finished()
    metrics = read(Metrics, run.folder)
    first, second = (inline_svg(figures.loss_curves(metrics), "loss", "Loss") for _ in range(2))
    assert first == second


def test_the_confusion_matrix_shows_all_nonzero_counts_and_all_classes():
    svg = inline_svg(figures.confusion_matrix([[31, 0], [7, 162]], ["cat", "dog"]), "c", "Confusion")
    shown = texts(svg)
    assert {"31", "7", "162", "cat", "dog"} <= set(shown)
    assert "0" not in shown


def test_a_confusion_matrix_of_more_than_fifty_classes_has_no_counts_and_fewer_names():
    n = 120
    rows = [[900 + i if i == j else 0 for j in range(n)] for i in range(n)]
    shown = texts(inline_svg(figures.confusion_matrix(rows, [f"bird {i}" for i in range(n)]), "c", "C"))
    assert not any(text.startswith("9") for text in shown)
    names = [text for text in shown if text.startswith("bird")]
    assert 20 < len(names) < 2 * n


def test_a_confusion_matrix_that_does_not_match_the_classes_is_rejected():
    with pytest.raises(ValueError, match=r"must be \[3, 3\] for 3 classes, got \[2, 2\]"):
        figures.confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"])


def test_class_names_are_rendered_literally_and_inside_the_figure():
    names = ["$x^2$", "<script>alert(1)</script>", "--></svg>", "狗", "a\nb"]
    rows = [[1] * 5] * 5
    svg = inline_svg(figures.confusion_matrix(rows, names), "c", 'a "quoted" <b>')
    shown = texts(svg)
    assert {"$x^2$", "<script>ale…cript>", "--></svg>", "狗", "a b"} <= set(shown)
    assert "<script" not in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;b&gt;"' in svg


def test_long_labels_are_shortened():
    assert shortened("number 1234567890", 10) == "number…890"
    assert shortened("bell\x07") == "bell\N{REPLACEMENT CHARACTER}"


def test_inline_figures_use_css_variables_and_unique_ids(run):
    run.finished()
    metrics = read(Metrics, run.folder)
    svg = inline_svg(figures.loss_curves(metrics), "one", "Loss")
    other = inline_svg(figures.score_curves(metrics, "accuracy"), "two", "Accuracy")
    assert "var(--ink)" in svg
    assert "var(--font)" in svg
    assert "DejaVu" not in svg
    ids = [node.get("id") for part in (svg, other) for node in ET.fromstring(part).iter() if node.get("id")]
    assert len(ids) == len(set(ids)) > 0
    links = [node.get(XLINK) for node in ET.fromstring(svg).iter() if node.get(XLINK)]
    assert links
    assert all(link.removeprefix("#") in ids for link in links)


def test_the_sparsity_map_shows_only_frozen_matrices_as_fully_sparse():
    matrices = [MatrixInfo(f"blocks.{d}.fc", "fc", d, (100, 100), 10_000, 10_000, 10_000) for d in range(4)]
    budgets = dict(zip((m.name for m in matrices), (0, 1, 2_500, 10_000), strict=True))
    shown = texts(inline_svg(allocation_figures.sparsity_map(matrices, budgets), "map", "Map"))
    assert {"×", "99", "75", "0", "fc", "block"} <= set(shown)
    assert "100" not in shown


def test_the_block_trend_is_the_least_squares_line_over_block_indices():
    matrices = [
        MatrixInfo(f"blocks.{d}.{kind}", kind, d, (10, 10), 100, 100, 100) for d in (2, 10, 11) for kind in ("q", "k")
    ]
    matrices.append(MatrixInfo("head", "head", None, (10, 10), 100, 100, 100))
    budgets = dict(zip((m.name for m in matrices), (100, 80, 60, 60, 50, 0, 100), strict=True))
    axes = allocation_figures.block_trend(matrices, budgets).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.1, 0.4, 0.75])
    assert [bar.get_center()[0] for bar in axes.patches] == pytest.approx([2, 10, 11])
    assert list(axes.lines[0].get_xdata()) == [2, 10, 11]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.0828767, 0.5541096, 0.6130137], abs=1e-6)
    shown = texts(inline_svg(axes.figure, "t", "T"))
    assert {"2", "10", "trend, +5.89 percentage points per block"} <= set(shown)
    assert allocation_figures.block_trend(matrices[:2], budgets) is None


def test_a_map_of_many_blocks_has_no_numbers():
    matrices = [MatrixInfo(f"blocks.{d}.fc", "fc", d, (10, 10), 100, 100, 100) for d in range(60)]
    shown = texts(inline_svg(allocation_figures.sparsity_map(matrices, {m.name: 25 for m in matrices}), "m", "Map"))
    assert "75" not in shown


def test_budget_figures_support_a_single_allocation_and_underscores():
    allocation = small_allocation([(100, 100)])
    assert {"budget", "target"} <= set(texts(inline_svg(allocation_figures.budget_curve(allocation, None), "b", "B")))
    shares = texts(inline_svg(allocation_figures.budget_shares(allocation, None), "s", "S"))
    assert {"q", "_k", "schedule time t"} <= set(shares)
    assert "matrices" in texts(inline_svg(allocation_figures.frozen_curve(allocation, None), "f", "F"))


def test_the_legend_of_many_blocks_lists_only_the_first_and_the_last():
    matrices = [MatrixInfo(f"blocks.{d}.fc", "fc", d, (10, 10), 100, 100, 100) for d in range(32)]
    budgets = {m.name: 50 for m in matrices}
    history = [AllocationStep(t, t, 2, 1600, budgets, {}) for t in range(3)]
    figure = allocation_figures.budget_shares(Allocation(3200, 1600, matrices, history), 2, by_block=True)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["0", "31"]


def test_the_mean_of_a_kind_ignores_values_off_the_log_scale():
    allocation = small_allocation([(50, 0), (60, 0)], {"q": 1e-6, "_k": 0.0})
    mean = allocation_figures.importance_curves(allocation, 2).axes[0].lines[1]
    assert list(mean.get_ydata()) == [1e-6, 1e-6]
    nothing = allocation_figures.importance_curves(allocation, 2).axes[0].lines[3]
    assert all(math.isnan(value) for value in nothing.get_ydata())


def test_importance_ticks_are_powers_of_ten():
    allocation = small_allocation([(50, 10), (60, 0)], {"q": 1e-3, "_k": 1e-8})
    shown = texts(inline_svg(allocation_figures.importance_curves(allocation, 2), "i", "I"))
    assert "10⁻⁵" in shown
    narrow = small_allocation([(50, 10), (60, 0)], {"q": 1e-3, "_k": 3e-3})
    assert "2·10⁻³" in texts(inline_svg(allocation_figures.importance_curves(narrow, 2), "i", "I"))
