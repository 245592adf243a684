"""``python -m prunegate``: the same as the command ``prunegate``."""

import sys

from prunegate.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
