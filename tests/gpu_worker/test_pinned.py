"""Tensors arrive on a GPU whole, whatever their size beside that of the buffers."""

import pytest
import torch

from gpu_worker.model.pinned import PinnedTransfer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("num", [0, 1, 1000, 4096, 4097, 100_000])
def test_a_tensor_arrives_whole(num):
    transfer = PinnedTransfer(torch.device("cuda"), buffer_bytes=4096)
    tensor = torch.randn(num).bfloat16()
    assert torch.equal(transfer(tensor).cpu(), tensor)
    assert torch.equal(transfer(tensor.view(1, -1)).cpu(), tensor.view(1, -1))
