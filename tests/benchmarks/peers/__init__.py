"""Other implementations of the same model on the same weights, each in a process of its own."""
