"""Starts the workers of a run, and starts them again after a fault. Imports no TensorFlow."""
