"""What an engine process runs: it owns one device and speaks no HTTP."""
