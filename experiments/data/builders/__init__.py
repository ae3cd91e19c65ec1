"""TFDS builders of our own; importing one takes TFDS' second."""
