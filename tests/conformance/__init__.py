"""Models as people write them, and what Keras's own `fit` on one device makes of each.

`case.py` says what a case is, `models/` has them by kind, `reference.py` trains one by plain Keras.
"""
