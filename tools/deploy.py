"""Writes a slim model in other forms, runs each and times them.

    python tools/deploy.py runs/demo/slim.safetensors --to onnx pt2 --check --bench
    python tools/deploy.py runs/demo/slim.safetensors --to int8 --data pictures/

The same as ``prunegate export``.
"""

import sys

from prunegate.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
