"""Training: state, step, loop, checkpoints, metrics and in-training evaluation."""
