"""Put the rows of results.jsonl into the README: python benchmarks/readme.py"""

from pathlib import Path

from snella.benchmark.summary import update_document

HERE = Path(__file__).parent

if __name__ == "__main__":
    changed = update_document(HERE.parent / "README.md", HERE / "results.jsonl")
    print("README.md changed" if changed else "README.md is up to date")
