"""Connects replicas and workers: strategies, collectives, and what they send."""
