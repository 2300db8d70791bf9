"""The command line `rmd`: thin commands over the other packages, and the only package that may import them all."""
