"""What every evaluation shares: features, distances, provenance."""
