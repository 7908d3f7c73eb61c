"""`python -m snella`: the command line, if the application's extra is installed."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("snella_app.cli.main").main())
