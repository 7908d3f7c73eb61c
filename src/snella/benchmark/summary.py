"""The rows as a table for people who read Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snella.benchmark.config import PEER
from snella.benchmark.rows import read_rows

_BEGIN, _END = "<!-- rows of benchmarks/results.jsonl begin -->", "<!-- rows end -->"


def performance_section(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the latest row of each setting: step times with their ratio to LoRA, and single matrices.

    Rows of one setting that were measured with other numbers of rounds stay beside each other, as ratios hold within a
    run alone; a run all of whose contenders were measured again later is left out.
    """
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["benchmark"] == "step_time":
            run = tuple(row[name] for name in ("backbone", "batch", "r", "sparsity", "dtype", "device", "rounds"))
            earlier = runs.pop(run, {})  # and to the end: the order is that of the last measurement
            runs[run] = earlier | {row["contender"]: row}
    order = list(runs)
    groups = {
        run: list(found.values())
        for k, (run, found) in enumerate(runs.items())
        if not any(later[:-1] == run[:-1] and found.keys() <= runs[later].keys() for later in order[k + 1 :])
    }
    parts = [_step_table(key, group) for key, group in groups.items()]
    matrices = {tuple(row["shape"]): row for row in rows if row["benchmark"] == "one_matrix"}
    if matrices:
        parts.append(_matrix_table(list(matrices.values())))
    samplings = {
        (*row["shape"], row["tokens"], row["density"]): row for row in rows if row["benchmark"] == "sampled_gradient"
    }
    if samplings:
        parts.append(_sampling_table(list(samplings.values())))
    return "\n\n".join(parts)


def update_document(path: str | Path, rows_file: str | Path) -> bool:
    """Put the tables between the two marks of a Markdown file.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: The file has no marks.
    """
    return put_between(path, _BEGIN, _END, performance_section(read_rows(rows_file)))


def put_between(path: str | Path, begin: str, end: str, section: str) -> bool:
    """Put text between two marks of a Markdown file; returns and raises as `update_document`."""
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{file} has no place for the rows; put the lines {begin!r} and {end!r} into it")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    updated = f"{before}{begin}\n\n{section}\n\n{end}{after}"
    if updated != text:
        file.write_text(updated, encoding="utf-8")
    return updated != text


def _step_table(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    """One setting."""
    backbone, batch, r, sparsity, dtype, device, rounds = key
    memory = next((name for name in ("peak_gpu_mib", "peak_rss_mib") if any(name in row for row in rows)), None)
    head = ["", "step", "÷ LoRA (quartiles)", "kept for backward"] + ([_MEMORY[memory]] if memory else [])
    lines = [
        f"**{backbone}, batch {batch}, r {r}, sparsity {sparsity}, {dtype}** · {device} · commit {rows[0]['commit']}"
        f"{' with changes' if rows[0]['dirty'] else ''}, {rows[0]['date'][:10]}, medians of {rounds}",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        low, high = row.get(f"step_over_{PEER}_quartiles", ("", ""))
        cells = [row["contender"], f"{row['step_s']:.2f} s", f"{row.get(f'step_over_{PEER}', '')} ({low}–{high})"]
        cells += [f"{row['saved_mib']:,.0f} MiB"]
        cells += [f"{row[memory]:,.0f} MiB" if memory in row else ""] if memory else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_MEMORY = {"peak_gpu_mib": "peak memory", "peak_rss_mib": "peak resident size"}


def _matrix_table(rows: list[dict[str, Any]]) -> str:
    """Single matrices."""
    lines = [
        "**One matrix merged, selected exactly and added to its weight** · "
        f"{rows[0]['device']}, {rows[0]['date'][:10]}",
        "",
        "| matrix | seconds | ÷ its forward product | tokens of the product | extra memory ÷ its own size |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        m, n = row["shape"]
        lines.append(
            f"| {m}×{n} | {row['effective_s']:.4f} | {row['effective_over_product']} | {row['tokens']:,} "
            f"| {row['extra_over_matrix']} |"
        )
    return "\n".join(lines)


def _sampling_table(rows: list[dict[str, Any]]) -> str:
    """The sampled gradient beside the whole product: a line for each matrix and number of tokens."""
    densities = sorted({row["density"] for row in rows})
    lines = [
        f"**A weight's gradient at its kept entries alone ÷ the whole product** · {rows[0]['device']}, "
        f"{rows[0]['date'][:10]}",
        "",
        "| matrix | tokens | " + " | ".join(f"{density:.1%} kept" for density in densities) + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    found: dict[tuple[int, int, int], dict[float, float]] = {}
    for row in rows:
        found.setdefault((*row["shape"], row["tokens"]), {})[row["density"]] = row["sampled_over_dense"]
    for (m, n, tokens), ratios in found.items():
        cells = [f"{ratios[density]:.2f}" if density in ratios else "" for density in densities]
        lines.append(f"| {m}×{n} | {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
