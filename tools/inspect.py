"""Shows what can be pruned of a timm model, what cannot and why, and what each of its parts costs.

    python tools/inspect.py resnet50
    python tools/inspect.py vit_tiny_patch16_224 --depth 3
    python tools/inspect.py resnet50 --json

This file has the name of a standard module that nearly everything imports, and Python puts a script's folder first on
its path. So the folder goes last here, and the tool itself stands in ``inspect_model.py``.
"""

import sys

folder = __file__.rpartition("/")[0]
if folder in sys.path:
    sys.path.remove(folder)
    sys.path.append(folder)

if __name__ == "inspect":
    # Another script of this folder, or something that it imports, asked for the standard module: hand it over.
    del sys.modules["inspect"]
    __import__("inspect")
elif __name__ == "__main__":
    from inspect_model import main

    main()
