"""Text that a model writes itself: nobody's copyright, as much as is wanted, and full of what it knows.

Shapes: S windows, O tokens that each begins with, T tokens each, M blocks of a sequence's cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.loader import load_model

OPENING = 4  # tokens taken from somebody's text
_AT_ONCE = 1024  # windows written side by side
_BLOCK_SIZE = 64

OnProgress = Callable[[str, int, int], None]  # what is being done, done, total


def openings(ids_ST: Tensor, num_windows: int) -> Tensor:
    """Beginnings from anywhere in int64 windows [S, T], int64 [num_windows, O]."""
    generator = torch.Generator().manual_seed(0)
    length = min(OPENING, ids_ST.shape[1])
    rows = torch.randint(len(ids_ST), (num_windows, 1), generator=generator)
    starts = torch.randint(ids_ST.shape[1] - length + 1, (num_windows, 1), generator=generator)
    return ids_ST[rows, starts + torch.arange(length)]


def sample(
    config: ModelConfig, openings_SO: Tensor, length: int, device: torch.device, on_progress: OnProgress
) -> Tensor:
    """What the model in `config.path` goes on to write at temperature 1, int64 [S, T] on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(config, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    parts = openings_SO.to(device).split(_AT_ONCE)
    written = []
    for number, part_SO in enumerate(parts):
        writer = _Writer(model, part_SO, length, generator)
        for position in range(length - 1):
            on_progress("sampling", number * length + position, len(parts) * length)
            writer.write(position)
        written.append(writer.ids_ST.cpu())
    on_progress("sampling", length * len(parts), length * len(parts))
    return torch.cat(written)


class _Writer:
    """Some windows and their cache, a token longer with each step."""

    def __init__(self, model: Decoder, openings_SO: Tensor, length: int, generator: torch.Generator) -> None:
        config, device = model.config, openings_SO.device
        windows, self._num_given = openings_SO.shape
        blocks = -(-length // _BLOCK_SIZE)
        self._model, self._generator = model, generator
        self._tables_SM = torch.arange(windows * blocks, dtype=torch.int32, device=device).view(windows, -1)
        self._cache = KVCache(
            config.num_hidden_layers, windows * blocks, _BLOCK_SIZE, config.num_key_value_heads,
            config.head_dim, model.dtype, device,
        )  # fmt: skip
        self.ids_ST = torch.zeros(windows, length, dtype=torch.int64, device=device)
        self.ids_ST[:, : self._num_given] = openings_SO

    def write(self, position: int) -> None:
        """Read the tokens at `position` and choose the next, but where it is given."""
        hidden_SD = self._model.forward(self._batch(position), self._cache)
        if position + 1 >= self._num_given:
            chances_SV = self._model.logits(hidden_SD).softmax(dim=-1)
            chosen_S1 = torch.multinomial(chances_SV, 1, generator=self._generator)
            self.ids_ST[:, position + 1] = chosen_S1.squeeze(1)

    def _batch(self, position: int) -> Batch:
        windows, device = len(self.ids_ST), self.ids_ST.device
        block, offset = divmod(position, _BLOCK_SIZE)
        return Batch(
            input_ids_T=self.ids_ST[:, position].contiguous(),
            positions_T=torch.full((windows,), position, device=device),
            slot_mapping_T=self._tables_SM[:, block].long() * _BLOCK_SIZE + offset,
            block_tables_SM=self._tables_SM,
            cu_seqlens_q=torch.arange(windows + 1, dtype=torch.int32, device=device),
            context_lens_S=torch.full((windows,), position + 1, dtype=torch.int32, device=device),
            max_query_len=1,
            sample_rows_S=torch.arange(windows, device=device),
        )
