"""Which weights become what: the options of `wint2 quantize`, and the config.json block that records them."""

from dataclasses import dataclass
from typing import Any, Literal

from cuda_kernels.formats.encoder import Effort
from gpu_worker.config import ModelConfig

DenseFormat = Literal["wint8", "none"]
LowFormat = Literal["wint2", "wint2t"]
ExpertFormat = Literal["wint4", "wint2", "wint2t"]


@dataclass(frozen=True)
class Tuning:
    """End-to-end tuning after the last layer; see gpu_worker/quantizer/tuning.py."""

    steps: int = 0  # 0: none
    batch: int = 8  # windows a step
    samples: int = 0  # windows that the original writes itself to learn from; 0: learn from those given
    rest: bool = True  # norms and what is outside the experts move, not the experts' column scales alone


@dataclass(frozen=True)
class Recipe:
    """Attention, dense MLPs and shared experts in WINT8; experts in WINT4 up to a layer, then two bits up to
    another, then WINT4 again."""

    wint4_end_layer: int = -1  # the last layer with WINT4 experts; -1 for none
    low_end_layer: int | None = None  # the last layer with 2-bit experts; None for the model's last
    dense: DenseFormat = "wint8"
    low: LowFormat = "wint2"
    effort: Effort = "normal"
    correct_experts: bool = True  # fit experts to the original's stream, not to their own old weights
    correct_dense: bool = True  # the same for attention output, dense and shared down projections
    min_rows: int = 256  # calibration rows an expert gets at least, lent by its router if need be
    tuning: Tuning = Tuning()

    def expert_format(self, layer: int) -> ExpertFormat:
        is_low = layer > self.wint4_end_layer and (self.low_end_layer is None or layer <= self.low_end_layer)
        return self.low if is_low else "wint4"

    def quantization_config(self, config: ModelConfig) -> dict[str, Any]:
        """The `quantization_config` that FastDeploy's ERNIE-4.5 2-bit checkpoints carry, and the K order.

        FastDeploy itself reads no `quant_end_layer` of the 2-bit experts: to it they go on to the last layer.
        """
        last = config.num_hidden_layers - 1 if self.low_end_layer is None else self.low_end_layer
        return {
            "quantization": self.low,
            "dense_quant_type": self.dense,
            "moe_quant_type": "w4w2",
            "moe_quant_config": {
                "moe_w4_quant_config": {
                    "quant_type": "wint4",
                    "quant_granularity": "per_channel",
                    "quant_start_layer": 0,
                    "quant_end_layer": self.wint4_end_layer,
                },
                "moe_w2_quant_config": {
                    "quant_type": self.low,
                    "quant_granularity": "pp_acc",
                    "quant_group_size": 64,
                    "quant_start_layer": self.wint4_end_layer + 1,
                    "quant_end_layer": last,
                    "k_order": "shuffled",
                },
            },
        }
