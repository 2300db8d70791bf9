"""From settings to a server that is ready."""
