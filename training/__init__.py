"""Training: the pictures, the embedded autoencoder and teacher, and distillation of any backbone."""
