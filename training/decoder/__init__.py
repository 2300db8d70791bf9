"""Small decoders, distilled from a backbone's own autoencoder."""
