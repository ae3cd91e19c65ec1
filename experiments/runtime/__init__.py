"""What knows nothing of training: errors, commands, files, interruption, hardware, the cache."""
