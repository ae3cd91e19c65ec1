"""Runs compared, as a table, a page and pictures."""
