"""A run assembled, its step and its loop."""
