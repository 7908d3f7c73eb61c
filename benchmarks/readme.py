"""Put the rows of results.jsonl, the costs estimated from them and the bundled suite's table into the documents.

python benchmarks/readme.py
"""

from costs import ROOT, update_costs
from suite_table import PAGE, update_suite

from snella.benchmark.figures import draw_figures
from snella.benchmark.summary import update_document

if __name__ == "__main__":
    rows = ROOT / "benchmarks" / "results.jsonl"
    changed = [ROOT / "README.md"] if update_document(ROOT / "README.md", rows) else []
    changed += update_costs(rows)
    changed += [PAGE] if update_suite() else []
    pictures = ROOT / "docs" / "images" / "speed"
    before = {path: path.read_bytes() for path in pictures.glob("*.svg")}
    changed += [path for path in draw_figures(rows, pictures) if path.read_bytes() != before.get(path)]
    names = [str(path.relative_to(ROOT)) for path in changed]
    print("\n".join(f"{name} changed" for name in names) or "README.md, docs/ and experiments/ are up to date")
