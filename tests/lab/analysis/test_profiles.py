"""Memory of known operations and radii of known accuracies."""

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn

from snella_app.report.style import PANEL
from snella_lab.analysis.profiles import LiveTensors, _draw_radar, memory, radar, record_memory, scaled_radius
from snella_lab.style import DARK


def test_live_tensors_are_counted_until_they_are_freed():
    weight = torch.zeros(1000)
    with LiveTensors([weight]) as live:
        assert live.live == 4000
        first = torch.zeros(500)
        second = first * 2
        view = first[:10]
        assert live.live == 8000  # views share their storage
        del first, view
        assert live.live == 6000
        del second
    assert live.live == 4000 and max(size for *_, size in live.points) == 8000


def test_step_memory_is_weights_activations_gradients_and_moments():
    model = nn.Linear(256, 256, bias=False)
    points = record_memory(model, torch.randn(2, 256), steps=2)
    weight, batch = 256 * 256 * 4 / 2**20, 2 * 256 * 4 / 2**20
    assert points[0]["mib"] == pytest.approx(weight + batch)
    peaks = {
        phase: max(p["mib"] for p in points if p["phase"] == phase and p["step"] == 2)
        for phase in ("forward", "backward")
    }
    assert peaks["forward"] == pytest.approx(3 * weight, rel=0.05)  # weight and both moments
    assert peaks["backward"] == pytest.approx(4 * weight, rel=0.05)  # and the gradient
    assert points[-1]["mib"] == pytest.approx(3 * weight, rel=0.05) and points[-1]["position"] == 6


def test_memory_of_a_run_is_recorded(old_run):
    (plot,) = memory([old_run], steps=1, batch_size=2)
    peaks = {row["phase"]: row["peak_mib"] for row in plot.tables["peaks"]}
    assert peaks["forward"] > plot.rows[0]["mib"] > 0.5 and set(peaks) == {"forward", "backward", "optimizer"}


def test_radius_is_one_for_the_best_and_similar_for_similar_values():
    assert scaled_radius(0.9, 0.7, 0.9) == 1 and scaled_radius(0.7, 0.7, 0.9) == pytest.approx(0.3)
    assert scaled_radius(0.8, 0.7, 0.9) == pytest.approx(0.65)
    assert scaled_radius(0.799, 0.799, 0.8) == pytest.approx(1 - 0.7 * 0.001 / 0.02)


def test_sixteen_methods_have_distinct_colors_with_contrast_in_both_modes():
    axes = ("medical", "glyphs", "natural")
    rows = [{"axis": a, "method": f"m{n}", "mean": 0.5, "radius": 0.5} for a in axes for n in range(16)]
    handles = _draw_radar(rows, dict.fromkeys(axes, True)).legends[0].legend_handles
    colors = [to_rgb(handle.get_color()) for handle in handles]
    assert len(colors) == len(set(colors)) == 16
    for panel in (PANEL, DARK[PANEL]):
        assert min(contrast(color, to_rgb(panel)) for color in colors) >= 3


def test_axis_labels_have_the_unit_of_the_metric():
    rows = [{"axis": axis, "method": "m", "mean": 0.5, "radius": 1.0} for axis in "abc"]
    texts = {text.get_text() for text in _draw_radar(rows, {"a": True, "b": False, "c": False}).axes[0].texts}
    assert texts == {"a", "b", "c", "50.0%", "0.500"}


def contrast(first, second):
    """Compute the WCAG contrast ratio."""

    def luminance(color):
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_folder_without_comparison_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiment\.yaml is missing"):
        radar([tmp_path])
