"""Pieces of kernels for Hopper GPUs, in Pallas' Mosaic GPU dialect: a ring of slots, products, streams of rows."""
