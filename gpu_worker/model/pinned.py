"""Tensors of mapped files to a GPU through two pinned buffers: one is filled while the other is on its way.

    file's pages   ─ copy ─►   buffer 0 | buffer 1   ─ DMA ─►   device
Host memory is these buffers, whatever a tensor's size; the file's pages are the page cache's.
"""

from __future__ import annotations

import torch

BUFFER_BYTES = 32 << 20


class PinnedTransfer:
    """Brings a tensor to the device; the result is whole once the current stream comes to it."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        arrived = torch.empty_like(tensor, device=self._device, memory_format=torch.contiguous_format)
        source, target = _bytes_of(tensor.contiguous()), _bytes_of(arrived)
        size = len(self._buffers[0])
        for begin in range(0, len(source), size):
            self._send(source[begin : begin + size], target[begin : begin + size])
        return arrived

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._turn = 1 - self._turn
        buffer, sent = self._buffers[self._turn][: len(source)], self._sent[self._turn]
        sent.synchronize()
        target.copy_(buffer.copy_(source), non_blocking=True)
        sent.record()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
