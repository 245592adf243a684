"""Writes one self-contained HTML page about a run: what was asked and reached, what was kept, where FLOPs went.

    python tools/report.py runs/demo

The same as ``prunegate report``.
"""

import sys

from prunegate.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
