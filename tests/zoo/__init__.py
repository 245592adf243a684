"""Small modules with couplings that are hard to find; each declares the units that must be found, no more, no less.

A unit is a mapping from (tensor, dimension) to the positions that go together. ``units()`` is written by hand from the
module's definition and shares nothing with the library.
"""

from tests.zoo import attention, convolutions, norms, streams, tokens
from tests.zoo.base import ZOO, Tricky, Unit

__all__ = ["ZOO", "Tricky", "Unit", "attention", "convolutions", "norms", "streams", "tokens"]
