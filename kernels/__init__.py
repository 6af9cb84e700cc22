"""The mathematics of each operator on tensors: one documented reference and its fast twins. Imports torch only."""
