"""Computes one step: gradients of the selection, their reduction, the update; and an evaluation step."""
