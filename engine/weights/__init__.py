"""Weights: from an official checkpoint file to named, checked, prepared tensors."""
