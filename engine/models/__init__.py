"""Models: one forward pass a generation, over packed tokens and a pool of states."""
