"""The parts of ``tools/compare.py``: data, networks, training, methods and the report."""
