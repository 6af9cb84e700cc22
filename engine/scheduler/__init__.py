"""Who runs in the next step, and what becomes of a sequence. Knows no tensors."""
