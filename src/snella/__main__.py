"""Entry point of `python -m snella`, the command line of `snella_app`; requires `snella[app]`."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("snella_app.cli.main").main())
