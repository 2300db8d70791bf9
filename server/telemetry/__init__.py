"""What is measured and told."""
