"""Video jobs: kept in a database, made by the executor, their films on disk; all of it survives a restart."""
