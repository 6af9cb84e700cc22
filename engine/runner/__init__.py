"""The device: a step plan in, a step output out."""
