"""Tables of step times, memory and single operations for `docs/notes/step-time.md`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from documents import markdown_table, put_between

from snella_lab.bench.baselines import REFERENCE
from snella_lab.bench.rows import grouped, is_step_time, read_rows, setting_key, sort_key

_BEGIN, _END = "<!-- rows of benchmarks/results.jsonl begin -->", "<!-- rows end -->"
_MEMORY = {"peak_gpu_mib": "peak memory", "peak_rss_mib": "peak RSS"}


def performance_section(rows: list[dict[str, Any]]) -> str:
    """Format the latest row of each setting as Markdown: step times relative to LoRA, memory and single operations.

    Rows of a setting with different `rounds` or dates go to separate tables, because ratios are comparable only within
    a run. A run is dropped if a later run of the same setting contains all its methods.
    """
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if is_step_time(row):
            setting = ("backbone", "batch", "r", "sparsity", "dtype", "device", "rounds", "date")
            run = tuple(row[name] for name in setting)
            earlier = runs.pop(run, {})  # reinserted last, to order runs by their latest measurement
            runs[run] = earlier | {row["method"]: row}
    order = list(runs)
    groups = {
        run: list(methods.values())
        for k, (run, methods) in enumerate(runs.items())
        if not any(later[:-2] == run[:-2] and methods.keys() <= runs[later].keys() for later in order[k + 1 :])
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


def update_document(path: str | Path, rows_file: str | Path) -> bool:
    """Write the performance tables between the markers of a Markdown file; return True if it changed."""
    return put_between(path, _BEGIN, _END, performance_section(read_rows(rows_file)))


def _source(row: dict[str, Any]) -> str:
    """Format the device and date of a row."""
    return f"{row['device']}, {row['date'][:10]}"


def _step_table(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    """Return the step time table of one setting."""
    backbone, batch, r, sparsity, dtype, device, rounds, _ = key
    memory = next((name for name in _MEMORY if any(name in row for row in rows)), None)
    head = ["", "step", "vs. LoRA (quartiles)", "saved for backward"] + ([_MEMORY[memory]] if memory else [])
    title = (
        f"**{backbone}, batch {batch}, r {r}, sparsity {sparsity}, {dtype}** · {device} · commit {rows[0]['commit']}"
        f"{' (modified)' if rows[0]['dirty'] else ''}, {rows[0]['date'][:10]}, median of {rounds}"
    )
    lines = []
    for row in rows:
        low, high = row.get(f"step_over_{REFERENCE}_quartiles", ("", ""))
        cells = [row["method"], f"{row['step_s']:.2f} s", f"{row.get(f'step_over_{REFERENCE}', '')} ({low}–{high})"]
        cells += [f"{row['saved_mib']:,.0f} MiB"]
        cells += [f"{row[memory]:,.0f} MiB" if memory in row else ""] if memory else []
        lines.append(cells)
    return f"{title}\n\n{markdown_table(head, lines)}"


def _memory_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return tables of saved tensors by model size, one per setting with at least two backbones."""
    latest = {setting_key(row)[:-1]: row for row in rows if row["benchmark"] == "kept_bytes"}
    tables = []
    for (batch, dtype, r, sparsity), part in grouped(list(latest.values()), "batch", "dtype", "r", "sparsity").items():
        counted: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in part:  # counted from shapes, so independent of the device
            counted[row["backbone"]][row["method"]] = row
        counted = {name: methods for name, methods in counted.items() if {REFERENCE, "snella"} <= methods.keys()}
        if len(counted) < 2:
            continue
        names = sorted({name for methods in counted.values() for name in methods} - {REFERENCE}, key=sort_key)
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
        tables.append(f"{title}\n\n{markdown_table(['backbone', REFERENCE, *names], lines)}")
    return tables


def _matrix_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of single-matrix measurements."""
    head = ["matrix", "seconds", "relative to the forward product", "tokens", "extra memory / matrix size"]
    lines = []
    for row in rows:
        (m, n), ratio, extra = row["shape"], row["effective_over_product"], row["extra_over_matrix"]
        lines.append([f"{m}×{n}", f"{row['effective_s']:.4f}", str(ratio), f"{row['tokens']:,}", str(extra)])
    title = f"**Effective weight of one matrix: merge, exact selection, addition** · {_source(rows[0])}"
    return f"{title}\n\n{markdown_table(head, lines)}"


def _sampling_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of sparse and dense weight gradients, one line per matrix and token count."""
    densities = sorted({row["density"] for row in rows})
    lines = []
    by_shape: dict[tuple[int, int, int], dict[float, float]] = {}
    for row in rows:
        by_shape.setdefault((*row["shape"], row["tokens"]), {})[row["density"]] = row["sampled_over_dense"]
    for (m, n, tokens), ratios in by_shape.items():
        cells = [f"{ratios[density]:.2f}" if density in ratios else "" for density in densities]
        lines.append([f"{m}×{n}", f"{tokens:,}", *cells])
    title = f"**Sparse weight gradient (SDDMM): time relative to the dense product** · {_source(rows[0])}"
    head = ["matrix", "tokens", *(f"density {density:.1%}" for density in densities)]
    return f"{title}\n\n{markdown_table(head, lines)}"


def _competition_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of importance, selection and allocation times, one line per backbone and batch size."""
    title = f"**Overhead of importance, selection and allocation** · {_source(rows[0])}, median of {rows[0]['rounds']}"
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
    return f"{title}, {rows[0]['clock']}\n\n{markdown_table(head, lines)}"
