"""SPE in transformers' FastSpeech2Conformer: between the decoder and the mel layer, as in the paper.

Importing this module registers ``spe_fastspeech2_conformer`` with ``AutoConfig`` and ``AutoModel``.
"""

from __future__ import annotations

from typing import Any

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        FastSpeech2ConformerConfig,
        FastSpeech2ConformerModel,
    )
except ImportError as error:
    raise ImportError("SPE for speech needs transformers: pip install graft-plugins transformers") from error

from spe_layers.init import Init
from spe_layers.surgery import insert_spe

MEL_LAYER = "speech_decoder_postnet.feat_out"


class SPEFastSpeech2ConformerConfig(FastSpeech2ConformerConfig):
    """``FastSpeech2ConformerConfig`` with the bands and the initialisation of the SPE.

    Args:
        spe_bands: octaves over the hidden states.
        spe_init: see ``spe_layers.SPE``.
        kwargs: those of ``FastSpeech2ConformerConfig``.
    """

    model_type = "spe_fastspeech2_conformer"

    def __init__(self, spe_bands: int = 5, spe_init: Init = "linear", **kwargs: Any) -> None:
        self.spe_bands, self.spe_init = spe_bands, spe_init
        super().__init__(**kwargs)


class SPEFastSpeech2ConformerModel(FastSpeech2ConformerModel):
    """``FastSpeech2ConformerModel`` whose mel layer reads ``SPE(hidden, hidden)`` of the decoder's output."""

    config_class = SPEFastSpeech2ConformerConfig

    def __init__(self, config: SPEFastSpeech2ConformerConfig) -> None:
        super().__init__(config)
        insert_spe(self, MEL_LAYER, config.spe_bands, init=config.spe_init)


AutoConfig.register(SPEFastSpeech2ConformerConfig.model_type, SPEFastSpeech2ConformerConfig)
AutoModel.register(SPEFastSpeech2ConformerConfig, SPEFastSpeech2ConformerModel)
