"""Checkpoints to model files: reading, rounding, packing, writing."""
