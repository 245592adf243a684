"""Samplers of hard and relaxed gates: one front door, several implementations, one meaning."""

from prunegate.gumbel.backends import backends
from prunegate.gumbel.norms import masked_layer_norm, masked_rms_norm
from prunegate.gumbel.philox import Philox
from prunegate.gumbel.products import gated_product
from prunegate.gumbel.sampling import gumbel_sigmoid, gumbel_softmax

__all__ = [
    "Philox",
    "backends",
    "gated_product",
    "gumbel_sigmoid",
    "gumbel_softmax",
    "masked_layer_norm",
    "masked_rms_norm",
]
