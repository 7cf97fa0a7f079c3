"""Fine-tuning: scales and positions, data, loss, step, checkpoints, loop."""
