"""Trains: the loop, what it builds, and what happens in it between steps."""
