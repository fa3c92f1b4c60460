"""Training: optimizer, step functions, devices, checkpoints, metrics, and the loop."""
