"""What a run is on disk: folder, state, checkpoints, records, parameters."""
