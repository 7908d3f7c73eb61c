"""The table of a comparison in Markdown, to be pasted into a document."""

from pathlib import Path

from snella._files import write_text
from snella.comparison.experiment import Experiment
from snella.comparison.statistics import Rows, final_rows
from snella.comparison.summary import METRICS, caption, summarise, table_cells
from snella.runs.protocol import protocol_of

FILE = "comparison.md"


def markdown_tables(experiment: Experiment, rows: Rows) -> str:
    """The tables of accuracy and balanced accuracy, with what they are, the command, the machine and the dates.

    Args:
        experiment: Order, groups and reference.
        rows: All rows.

    Returns:
        Markdown; says so where no final cell is finished.
    """
    summary = summarise(experiment, rows)
    if not summary.finals:
        return "No final cell is finished yet.\n"
    parts = []
    for metric, title in METRICS.items():
        headings, *lines = table_cells(summary, metric, with_costs=metric == "test_accuracy")
        rule = [" --- " if heading == "method" else " ---: " for heading in headings]
        table = [_line(headings), f"|{'|'.join(rule)}|", *map(_line, lines)]
        parts.append(f"**Test {title}**\n\n" + "\n".join(table))
    done = f"{summary.finals} of {summary.expected} final cells"
    parts.append(f"{caption(summary)[0].upper()}{caption(summary)[1:]}. {done}. {_provenance(experiment, rows)}")
    warning = protocol_of(experiment.settings.get("protocol", "standard")).warning
    parts += [f"Official protocol: {warning}"] if warning else []
    if summary.failed:
        parts.append("Failed: " + "; ".join(f"`{row['cell']}`, {row['error']}" for row in summary.failed))
    return "\n\n".join(parts) + "\n"


def write_markdown(root: Path, experiment: Experiment, rows: Rows) -> Path:
    """Write them beside the page."""
    write_text(root / FILE, markdown_tables(experiment, rows))
    return root / FILE


def _line(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _provenance(experiment: Experiment, rows: Rows) -> str:
    """Where the numbers come from."""
    finals = final_rows(rows)
    dates = sorted({str(row["created_at"])[:10] for row in finals})
    machines = sorted({str(row["system_info"].get("processor") or row["system_info"].get("machine")) for row in finals})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    command = f"`{experiment.command}`, " if experiment.command else ""
    commits = dict.fromkeys(str(row["package_info"].get("snella-commit-hash") or "")[:8] for row in finals)
    code = ", ".join(commit for commit in commits if commit)
    return f"{command}{', '.join(machines)}, {when}{f', snella {code}' if code else ''}."
