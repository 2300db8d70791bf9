"""Built engines at work: chosen, loaded, covered with batches, replayed. Nothing here imports the building of them."""
