"""Rows of results: provenance, JSON lines, tables and figures."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from snella_app.report.style import COLORS, CURVE, add_legend, new_figure, save_figure
from snella_lab.bench.baselines import REFERENCE

_PACKAGES = ("torch", "peft", "timm", "numpy", "numba", "triton")


def conditions(device: str) -> dict[str, Any]:
    """Command without its output path, machine, versions, commit and date."""
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    git = ["git", "-C", str(Path(__file__).parent)]
    return {
        "command": re.sub(r" --out[= ]\S+", "", words),
        "device": device_name(device),
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name) is not None},
        "commit": _output([*git, "rev-parse", "--short", "HEAD"]),
        "dirty": bool(_output([*git, "status", "--porcelain", "--untracked-files=no", ":/"])),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """What a row calls the machine; a CPU says that it is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {_processor()}"


def append_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON lines file."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file; a line that was cut off at its end is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another line is damaged.
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


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


_BEGIN, _END = "<!-- rows of benchmarks/results.jsonl begin -->", "<!-- rows end -->"


def performance_section(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the latest row of each setting: step times with their ratio to LoRA, and single matrices.

    Rows of one setting that were measured with other numbers of rounds stay beside each other, as ratios hold within a
    run alone; a run all of whose methods were measured again later is left out.
    """
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if _is_step(row):
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


def _is_step(row: dict[str, Any]) -> bool:
    """Whether a row is a step's time; on the CPU `snella-keep-delta` was a second measurement of `snella`."""
    is_repeated = row.get("contender") == "snella-keep-delta" and row["device"].startswith("cpu")
    return row.get("benchmark") == "step_time" and not is_repeated


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


def _markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A table below its title."""
    lines = [" | ".join(cells) for cells in (head, *rows)]
    return "\n".join([title, "", f"| {lines[0]} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines[1:])])


def _step_table(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    """One setting."""
    backbone, batch, r, sparsity, dtype, device, rounds = key
    memory = next((name for name in ("peak_gpu_mib", "peak_rss_mib") if any(name in row for row in rows)), None)
    head = ["", "step", "÷ LoRA (quartiles)", "kept for backward"] + ([_MEMORY[memory]] if memory else [])
    title = (
        f"**{backbone}, batch {batch}, r {r}, sparsity {sparsity}, {dtype}** · {device} · commit {rows[0]['commit']}"
        f"{' with changes' if rows[0]['dirty'] else ''}, {rows[0]['date'][:10]}, medians of {rounds}"
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
    """What methods keep for the backward pass, by size of the backbone: a table for each setting that has several."""
    latest = {_key(row)[:-1]: row for row in rows if row["benchmark"] == "kept_bytes"}
    tables = []
    for (batch, dtype, r, sparsity), part in _grouped(list(latest.values()), "batch", "dtype", "r", "sparsity").items():
        counted: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in part:  # counted from shapes, so that machines do not matter
            counted[row["backbone"]][row["contender"]] = row
        counted = {name: found for name, found in counted.items() if {REFERENCE, "snella"} <= found.keys()}
        if len(counted) < 2:
            continue
        names = sorted({name for found in counted.values() for name in found} - {REFERENCE}, key=_place)
        settings = f"batch {batch}, r {r}, sparsity {sparsity}, {dtype}"
        title = f"**Kept for the backward pass by size of model, {settings}** (÷ LoRA); counted"
        lines = []
        for backbone, found in sorted(counted.items(), key=lambda one: one[1][REFERENCE]["weights"]):
            kept = found[REFERENCE]["saved_mib"]
            cells = [f"{backbone}, {found[REFERENCE]['weights'] / 1e6:.0f} M", f"{kept:,.0f} MiB"]
            cells += [
                f"{found[name]['saved_mib']:,.0f} MiB ({found[name]['saved_mib'] / kept:.2f})" if name in found else ""
                for name in names
            ]
            lines.append(cells)
        tables.append(_markdown(title, ["backbone", REFERENCE, *names], lines))
    return tables


_MEMORY = {"peak_gpu_mib": "peak memory", "peak_rss_mib": "peak resident size"}


def _matrix_table(rows: list[dict[str, Any]]) -> str:
    """Single matrices."""
    where = f"{rows[0]['device']}, {rows[0]['date'][:10]}"
    head = ["matrix", "seconds", "÷ its forward product", "tokens of the product", "extra memory ÷ its own size"]
    lines = []
    for row in rows:
        (m, n), ratio, extra = row["shape"], row["effective_over_product"], row["extra_over_matrix"]
        lines.append([f"{m}×{n}", f"{row['effective_s']:.4f}", str(ratio), f"{row['tokens']:,}", str(extra)])
    return _markdown(f"**One matrix merged, selected exactly and added to its weight** · {where}", head, lines)


def _sampling_table(rows: list[dict[str, Any]]) -> str:
    """The sampled gradient beside the whole product: a line for each matrix and number of tokens."""
    densities = sorted({row["density"] for row in rows})
    where = f"{rows[0]['device']}, {rows[0]['date'][:10]}"
    lines = []
    found: dict[tuple[int, int, int], dict[float, float]] = {}
    for row in rows:
        found.setdefault((*row["shape"], row["tokens"]), {})[row["density"]] = row["sampled_over_dense"]
    for (m, n, tokens), ratios in found.items():
        cells = [f"{ratios[density]:.2f}" if density in ratios else "" for density in densities]
        lines.append([f"{m}×{n}", f"{tokens:,}", *cells])
    title = f"**A weight's gradient at its kept entries alone ÷ the whole product** · {where}"
    return _markdown(title, ["matrix", "tokens", *(f"{density:.1%} kept" for density in densities)], lines)


def _competition_table(rows: list[dict[str, Any]]) -> str:
    """The competition's own time: a line for each backbone and batch."""
    where = f"{rows[0]['device']}, {rows[0]['date'][:10]}, medians of {rows[0]['rounds']}, {rows[0]['clock']}"
    head = ["", "whole step", "importance", "selection", "share of the step", "allocation, once an epoch"]
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
    return _markdown(f"**Competition alone** · {where}", head, lines)


_COMMON = ("dtype", "r", "sparsity", "device")
_ORDER = (
    *("lora", "snella", "full", "paper", "frozen", "dora", "shira", "snella-keep-delta"),
    *("klora", "spt-lora", "spt-adapter", "snell"),
)


def draw_figures(rows_file: str | Path, folder: str | Path) -> list[Path]:
    """Draw every picture that the rows allow.

    Args:
        rows_file: JSON lines of `bench`. Of several rows of one setting the last one counts.
        folder: Where the SVG files go.

    Returns:
        Their paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    latest = {_key(row): row for row in read_rows(rows_file) if _is_step(row)}
    rows = [row | {"million": row["weights"] / 1e6, "counted_mib": _counted_mib(row)} for row in latest.values()]
    drawn = []
    for (backbone, *common), part in _grouped(rows, "backbone", *_COMMON).items():
        if len({row["batch"] for row in part}) > 1:
            path = folder / f"time-{backbone}{_suffix(*common)}.svg"
            title = f"{backbone}, {_words(*common)}"
            drawn.append(_lines(path, part, "batch", "step_s", title, "images per step", "seconds per step"))
    for (batch, *common), part in _grouped(rows, "batch", *_COMMON).items():
        memory = next((key for key in ("peak_gpu_mib", "peak_step_mib", "counted_mib") if key in part[0]), None)
        if memory is not None and len({row["backbone"] for row in part}) > 1:
            path = folder / f"memory-batch{batch}{_suffix(*common)}.svg"
            label = {"counted_mib": "memory by count (MiB)"}.get(memory, "peak memory (MiB)")
            title = f"batch {batch}, {_words(*common)}"
            drawn.append(_lines(path, part, "million", memory, title, "weights (millions)", label))
    return drawn


def _counted_mib(row: dict[str, Any]) -> float:
    """What a step needs by count: weights, kept activations, and of what is trained gradients and AdamW's two moments.

    SNELLA's importance is two more averages, in float32.
    """
    bytes_each = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    importance = 2 * 4 * row["trainable"] if row["contender"].startswith("snella") else 0
    return float(row["saved_mib"] + ((row["weights"] + 3 * row["trainable"]) * bytes_each + importance) / 2**20)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    return tuple(row.get(name) for name in ("contender", "backbone", "r", "sparsity", "dtype", "batch", "device"))


def _grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows that share some values."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _lines(path: Path, rows: list[dict[str, Any]], x: str, y: str, title: str, x_label: str, y_label: str) -> Path:
    """One line per method."""
    figure, axes = new_figure(*CURVE, title)
    names = sorted({row["contender"] for row in rows}, key=_place)
    for name in names:
        points = sorted((row[x], row[y]) for row in rows if row["contender"] == name and y in row)
        color = COLORS[_place(name)[0] % len(COLORS)]
        # the peer is dashed and on top: where another's line is the same, both are seen
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


def _place(name: str) -> tuple[int, str]:
    """The position of a method among the others, which decides its color."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), name


def _words(dtype: str, r: int, sparsity: float, device: str) -> str:
    """What a picture's rows have in common; a CPU says that it is one."""
    where = device.partition(",")[0].upper() if device.startswith("cpu") else device
    return f"{dtype}, r {r}, sparsity {sparsity}, {where}"


def _suffix(dtype: str, r: int, sparsity: float, device: str) -> str:
    """The same for a file's name."""
    where = "cpu" if device.startswith("cpu") else "".join(c if c.isalnum() else "-" for c in device.lower())
    return f"-{dtype}-r{r}-sparsity{sparsity}-{where}"
