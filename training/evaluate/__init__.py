"""Measuring a checkpoint on the held-out pictures: features, distances, text alignment, tables and contact sheets."""
