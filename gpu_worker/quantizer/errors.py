"""What can be wrong with a checkpoint to quantize."""


class QuantizeError(ValueError):
    """The input cannot be quantized, or the output not written; the message names file or tensor and the
    reason."""
