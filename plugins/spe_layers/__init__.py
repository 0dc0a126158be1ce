"""SPE: sinusoidal positional encoding as a drop-in first layer for networks over coordinates."""

from spe_layers.bands import Bands
from spe_layers.baselines import FIRST_LAYERS, build_first_layer
from spe_layers.encoding import FrequencyAnnealing, PositionalEncoding, phases, positional_encoding
from spe_layers.functional import spe
from spe_layers.layer import SPE
from spe_layers.ntk import closed_form_ntk, empirical_ntk, gradient_flow, leave_one_out
from spe_layers.pruning import PruneResult, prune_bands
from spe_layers.selection import select_bands
from spe_layers.spectrum import SpectrumReport, effective_frequencies, spectrum_report
from spe_layers.stack import spe_linear_relu
from spe_layers.surgery import insert_spe, swap_first_layer
from spe_layers.tcnn_config import from_tcnn_config

__all__ = [
    "FIRST_LAYERS",
    "SPE",
    "Bands",
    "FrequencyAnnealing",
    "PositionalEncoding",
    "PruneResult",
    "SpectrumReport",
    "build_first_layer",
    "closed_form_ntk",
    "effective_frequencies",
    "empirical_ntk",
    "from_tcnn_config",
    "gradient_flow",
    "insert_spe",
    "leave_one_out",
    "phases",
    "positional_encoding",
    "prune_bands",
    "select_bands",
    "spe",
    "spe_linear_relu",
    "spectrum_report",
    "swap_first_layer",
]
