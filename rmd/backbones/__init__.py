"""One adapter a model family: encode prompts, predict x0 at a size and a time, decode."""
