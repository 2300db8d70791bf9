"""A checkpoint in, compiled engines out: one per component, size and batch bucket, kept in a store and run by it."""
