"""A trained model on rows: a run opened again, scores of its training rows, and what they choose."""
