"""Benchmark rows: provenance, JSON lines, tables and figures."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from snella_app.report.style import COLORS, CURVE, add_legend, new_figure, save_figure
from snella_lab.bench.baselines import REFERENCE
from snella_lab.provenance import git_state, processor_name

_PACKAGES = ("torch", "peft", "timm", "numpy", "numba", "triton")


def conditions(device: str, packages: Iterable[str] = _PACKAGES) -> dict[str, Any]:
    """Return the provenance of a row: command without its output path, device, package versions, commit and date."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    commit, is_dirty = git_state()
    return {
        "command": re.sub(r" --out[= ]\S+", "", command),
        "device": device_name(device),
        "versions": {name: version(name) for name in packages if find_spec(name) is not None},
        "commit": (commit or "")[:7],
        "dirty": bool(is_dirty),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """Return the device name of a row; CPU names start with "cpu"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {processor_name()}"


def append_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON lines file."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON lines file; skip a truncated last line.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If any other line is invalid JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {error}; remove it") from None
    return rows


_BEGIN, _END = "<!-- rows of benchmarks/results.jsonl begin -->", "<!-- rows end -->"


def performance_section(rows: list[dict[str, Any]]) -> str:
    """Format the latest row of each setting as Markdown: step times relative to LoRA, memory and single operations.

    Rows of one setting with different `rounds` get separate tables, because ratios are comparable only within a run.
    A later run replaces an earlier run of the same setting if it has all of its methods.
    """
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if _is_step_time(row):
            run = tuple(row[name] for name in ("backbone", "batch", "r", "sparsity", "dtype", "device", "rounds"))
            earlier = runs.pop(run, {})  # re-insert at the end: order by latest measurement
            runs[run] = earlier | {row["contender"]: row}
    order = list(runs)
    groups = {
        run: list(methods.values())
        for k, (run, methods) in enumerate(runs.items())
        if not any(later[:-1] == run[:-1] and methods.keys() <= runs[later].keys() for later in order[k + 1 :])
    }
    parts = [_step_table(key, group) for key, group in groups.items()]
    parts += _memory_tables(rows)
    matrices = {tuple(row["shape"]): row for row in rows if row["benchmark"] == "one_matrix"}
    if matrices:
        parts.append(_matrix_table(list(matrices.values())))
    samplings = {
        (*row["shape"], row["tokens"], row["density"]): row for row in rows if row["benchmark"] == "sampled_gradient"
    }
    if samplings:
        parts.append(_sampling_table(list(samplings.values())))
    competitions = {(row["backbone"], row["batch"]): row for row in rows if row["benchmark"] == "competition"}
    if competitions:
        parts.append(_competition_table(list(competitions.values())))
    return "\n\n".join(parts)


def _is_step_time(row: dict[str, Any]) -> bool:
    """Return True for a step time row, except `snella-keep-delta` on CPU, which repeats `snella`."""
    is_repeated = row.get("contender") == "snella-keep-delta" and row["device"].startswith("cpu")
    return row.get("benchmark") == "step_time" and not is_repeated


def update_document(path: str | Path, rows_file: str | Path) -> bool:
    """Write the performance tables between the markers of a Markdown file.

    Returns:
        True if the file changed.

    Raises:
        ValueError: If the file has no markers.
    """
    return put_between(path, _BEGIN, _END, performance_section(read_rows(rows_file)))


def put_between(path: str | Path, begin: str, end: str, section: str) -> bool:
    """Replace the text between two markers of a Markdown file; see `update_document`."""
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{file} must contain the markers {begin!r} and {end!r}; add both lines")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    updated = f"{before}{begin}\n\n{section}\n\n{end}{after}"
    if updated != text:
        file.write_text(updated, encoding="utf-8")
    return updated != text


def _markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with a title."""
    lines = [" | ".join(cells) for cells in (head, *rows)]
    return "\n".join([title, "", f"| {lines[0]} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines[1:])])


def _step_table(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    """Return the step time table of one setting."""
    backbone, batch, r, sparsity, dtype, device, rounds = key
    memory = next((name for name in ("peak_gpu_mib", "peak_rss_mib") if any(name in row for row in rows)), None)
    head = ["", "step", "vs. LoRA (quartiles)", "saved for backward"] + ([_MEMORY[memory]] if memory else [])
    title = (
        f"**{backbone}, batch {batch}, r {r}, sparsity {sparsity}, {dtype}** · {device} · commit {rows[0]['commit']}"
        f"{' (modified)' if rows[0]['dirty'] else ''}, {rows[0]['date'][:10]}, median of {rounds}"
    )
    lines = []
    for row in rows:
        low, high = row.get(f"step_over_{REFERENCE}_quartiles", ("", ""))
        cells = [row["contender"], f"{row['step_s']:.2f} s", f"{row.get(f'step_over_{REFERENCE}', '')} ({low}–{high})"]
        cells += [f"{row['saved_mib']:,.0f} MiB"]
        cells += [f"{row[memory]:,.0f} MiB" if memory in row else ""] if memory else []
        lines.append(cells)
    return _markdown(title, head, lines)


def _memory_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return tables of saved tensors by backbone size, one per setting with at least two backbones."""
    latest = {_setting_key(row)[:-1]: row for row in rows if row["benchmark"] == "kept_bytes"}
    tables = []
    for (batch, dtype, r, sparsity), part in _grouped(list(latest.values()), "batch", "dtype", "r", "sparsity").items():
        counted: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in part:  # counted from shapes, independent of the device
            counted[row["backbone"]][row["contender"]] = row
        counted = {name: methods for name, methods in counted.items() if {REFERENCE, "snella"} <= methods.keys()}
        if len(counted) < 2:
            continue
        names = sorted({name for methods in counted.values() for name in methods} - {REFERENCE}, key=_sort_key)
        settings = f"batch {batch}, r {r}, sparsity {sparsity}, {dtype}"
        title = f"**Saved for backward by model size, {settings}** (ratio to LoRA), counted from shapes"
        lines = []
        for backbone, methods in sorted(counted.items(), key=lambda item: item[1][REFERENCE]["weights"]):
            saved = {name: row["saved_mib"] for name, row in methods.items()}
            reference = saved[REFERENCE]
            cells = [f"{backbone}, {methods[REFERENCE]['weights'] / 1e6:.0f} M", f"{reference:,.0f} MiB"]
            cells += [
                f"{saved[name]:,.0f} MiB ({saved[name] / reference:.2f})" if name in saved else "" for name in names
            ]
            lines.append(cells)
        tables.append(_markdown(title, ["backbone", REFERENCE, *names], lines))
    return tables


_MEMORY = {"peak_gpu_mib": "peak memory", "peak_rss_mib": "peak RSS"}


def _matrix_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of single-matrix measurements."""
    source = f"{rows[0]['device']}, {rows[0]['date'][:10]}"
    head = ["matrix", "seconds", "relative to the forward product", "tokens", "extra memory / matrix size"]
    lines = []
    for row in rows:
        (m, n), ratio, extra = row["shape"], row["effective_over_product"], row["extra_over_matrix"]
        lines.append([f"{m}×{n}", f"{row['effective_s']:.4f}", str(ratio), f"{row['tokens']:,}", str(extra)])
    return _markdown(f"**Effective weight of one matrix: merge, exact selection, addition** · {source}", head, lines)


def _sampling_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of sampled vs. dense weight gradients, one line per matrix and number of tokens."""
    densities = sorted({row["density"] for row in rows})
    source = f"{rows[0]['device']}, {rows[0]['date'][:10]}"
    lines = []
    by_shape: dict[tuple[int, int, int], dict[float, float]] = {}
    for row in rows:
        by_shape.setdefault((*row["shape"], row["tokens"]), {})[row["density"]] = row["sampled_over_dense"]
    for (m, n, tokens), ratios in by_shape.items():
        cells = [f"{ratios[density]:.2f}" if density in ratios else "" for density in densities]
        lines.append([f"{m}×{n}", f"{tokens:,}", *cells])
    title = f"**Sparse weight gradient (SDDMM): time relative to the dense product** · {source}"
    return _markdown(title, ["matrix", "tokens", *(f"density {density:.1%}" for density in densities)], lines)


def _competition_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of importance, selection and allocation time, one line per backbone and batch size."""
    source = f"{rows[0]['device']}, {rows[0]['date'][:10]}, median of {rows[0]['rounds']}, {rows[0]['clock']}"
    head = ["", "step", "importance", "selection", "fraction of the step", "allocation, once per epoch"]
    lines = [
        [
            f"{row['backbone']}, batch {row['batch']}",
            f"{row['step_s']:.2f} s",
            *(f"{row[name]:.3f} s" for name in ("importance_s", "select_s")),
            f"{row['competition_over_step']:.1%}",
            f"{row['allocate_s']:.3f} s",
        ]
        for row in rows
    ]
    return _markdown(f"**Overhead of importance, selection and allocation** · {source}", head, lines)


_COMMON = ("dtype", "r", "sparsity", "device")
_ORDER = (
    *("lora", "snella", "full", "paper", "frozen", "dora", "shira", "snella-keep-delta"),
    *("klora", "spt-lora", "spt-adapter", "snell"),
)


def draw_figures(rows_file: str | Path, folder: str | Path) -> list[Path]:
    """Draw step time versus batch size and memory versus model size.

    Args:
        rows_file: JSON lines of `bench`. The last row of each setting is drawn.
        folder: Output folder for the SVG files.

    Returns:
        Paths of the SVG files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    latest = {_setting_key(row): row for row in read_rows(rows_file) if _is_step_time(row)}
    rows = [row | {"million": row["weights"] / 1e6, "counted_mib": _counted_mib(row)} for row in latest.values()]
    paths = []
    for (backbone, *common), part in _grouped(rows, "backbone", *_COMMON).items():
        if len({row["batch"] for row in part}) > 1:
            path = folder / f"time-{backbone}{_suffix(*common)}.svg"
            title = f"{backbone}, {_settings_text(*common)}"
            paths.append(_draw_lines(path, part, "batch", "step_s", title, "batch size", "seconds per step"))
    for (batch, *common), part in _grouped(rows, "batch", *_COMMON).items():
        memory = next((key for key in ("peak_gpu_mib", "peak_step_mib", "counted_mib") if key in part[0]), None)
        if memory is not None and len({row["backbone"] for row in part}) > 1:
            path = folder / f"memory-batch{batch}{_suffix(*common)}.svg"
            label = {"counted_mib": "estimated memory (MiB)"}.get(memory, "peak memory (MiB)")
            title = f"batch {batch}, {_settings_text(*common)}"
            paths.append(_draw_lines(path, part, "million", memory, title, "weights (millions)", label))
    return paths


def _counted_mib(row: dict[str, Any]) -> float:
    """Estimate step memory: weights, saved tensors, gradients and AdamW's two moments of trainable parameters.

    SNELLA's importance adds two float32 averages for each trainable parameter.
    """
    bytes_each = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    importance = 2 * 4 * row["trainable"] if row["contender"].startswith("snella") else 0
    return float(row["saved_mib"] + ((row["weights"] + 3 * row["trainable"]) * bytes_each + importance) / 2**20)


def _setting_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the setting that a row measures."""
    return tuple(row.get(name) for name in ("contender", "backbone", "r", "sparsity", "dtype", "batch", "device"))


def _grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Group rows by the values of `names`."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _draw_lines(path: Path, rows: list[dict[str, Any]], x: str, y: str, title: str, x_label: str, y_label: str) -> Path:
    """Draw one line per method."""
    figure, axes = new_figure(*CURVE, title)
    names = sorted({row["contender"] for row in rows}, key=_sort_key)
    for name in names:
        points = sorted((row[x], row[y]) for row in rows if row["contender"] == name and y in row)
        color = COLORS[_sort_key(name)[0] % len(COLORS)]
        # dashed and on top, so that an identical line below stays visible
        style: dict[str, Any] = {"linestyle": "--", "zorder": 3} if name == REFERENCE else {}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=name, **style)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    add_legend(figure, handles, labels)
    save_figure(figure, path)
    return path


def _sort_key(name: str) -> tuple[int, str]:
    """Return the position of a method, which selects its color."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), name


def _settings_text(dtype: str, r: int, sparsity: float, device: str) -> str:
    """Format the shared settings of a figure; CPU devices are abbreviated to "CPU"."""
    source = device.partition(",")[0].upper() if device.startswith("cpu") else device
    return f"{dtype}, r {r}, sparsity {sparsity}, {source}"


def _suffix(dtype: str, r: int, sparsity: float, device: str) -> str:
    """Format the shared settings as a file name suffix."""
    source = "cpu" if device.startswith("cpu") else "".join(c if c.isalnum() else "-" for c in device.lower())
    return f"-{dtype}-r{r}-sparsity{sparsity}-{source}"
