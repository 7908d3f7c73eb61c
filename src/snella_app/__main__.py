"""`python -m snella`: the command line."""

import sys

from snella_app.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
