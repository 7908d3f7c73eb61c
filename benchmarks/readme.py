"""Update generated tables and figures in the documents: step time, memory, cost estimates and comparison results.

python benchmarks/readme.py
"""

import argparse

from costs import ROOT, update_costs
from selective_checkpointing import PAGE as MEMORY_PAGE
from selective_checkpointing import update_page as update_memory_page
from step_memory import PAGE as PAPER_PAGE
from step_memory import update_page
from step_tables import update_document
from suite_table import FIGURES, PAGE, draw_suite, update_suite, update_twins

from snella_lab.bench.rows import draw_figures

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = ROOT / "benchmarks" / "results.jsonl"
    steps_page = ROOT / "docs" / "notes" / "step-time.md"
    changed = [steps_page] if update_document(steps_page, rows) else []
    changed += [PAPER_PAGE] if update_page() else []
    changed += [MEMORY_PAGE] if update_memory_page() else []
    changed += update_costs(rows)
    changed += [PAGE] if update_suite() else []
    changed += [PAGE] if update_twins() else []
    speed = ROOT / "docs" / "images" / "speed"
    before = {path: path.read_bytes() for folder in (speed, FIGURES) for path in folder.glob("*.svg")}
    figures = [*draw_figures(rows, speed), *draw_suite()]
    changed += [path for path in figures if path.read_bytes() != before.get(path)]
    names = [str(path.relative_to(ROOT)) for path in changed]
    print("\n".join(f"{name} changed" for name in names) or "all pages are up to date")
