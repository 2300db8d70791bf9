"""Every engine of a checkpoint beside eager."""
