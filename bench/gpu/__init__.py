"""What is measured on a lent GPU, case by case."""
