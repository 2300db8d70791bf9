"""What to build of a checkpoint, and the memory it will take."""
