"""Offline quantization of a checkpoint, one expert in memory at a time: what `wint2 quantize` runs."""
