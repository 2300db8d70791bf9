"""How the models in the box were made: the pictures and films, the autoencoder, the two teachers."""
