"""Recurrent states: in the pool, in host memory, as checkpoints, in the store."""
