"""What a model and its step need, told before there is a device: what `describe` prints."""
