"""The model families that the decoder can be: one declaration each, found by config.json's `model_type`."""

from gpu_worker.model.families.deepseek import DEEPSEEK
from gpu_worker.model.families.dots1 import DOTS1
from gpu_worker.model.families.ernie import ERNIE
from gpu_worker.model.families.mixtral import MIXTRAL
from gpu_worker.model.families.olmoe import OLMOE
from gpu_worker.model.families.qwen2_moe import QWEN2_MOE
from gpu_worker.model.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES"]

FAMILIES = {
    family.model_type: family for family in (ERNIE, QWEN3_MOE, QWEN2_MOE, MIXTRAL, OLMOE, DEEPSEEK, DOTS1)
}
