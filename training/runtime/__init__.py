"""What every training loop stands on: files, checkpoints, metrics, random generators, processes."""
