"""SPE: sinusoidal positional encoding as a drop-in first layer for networks over coordinates."""

from spe_layers.bands import Bands
from spe_layers.encoding import FrequencyAnnealing, PositionalEncoding, phases, positional_encoding
from spe_layers.functional import spe
from spe_layers.layer import SPE
from spe_layers.ntk import closed_form_ntk, empirical_ntk, gradient_flow, leave_one_out
from spe_layers.selection import select_bands

__all__ = [
    "SPE",
    "Bands",
    "FrequencyAnnealing",
    "PositionalEncoding",
    "closed_form_ntk",
    "empirical_ntk",
    "gradient_flow",
    "leave_one_out",
    "phases",
    "positional_encoding",
    "select_bands",
    "spe",
]
