"""What `benchmark` times: training steps and optimizers' updates."""
