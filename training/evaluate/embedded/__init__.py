"""The embedded models on their held-out sets: pictures and films."""
