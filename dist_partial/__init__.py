"""Train a rule-selected part of a Keras model on several replicas, and send only that part's gradients."""
