"""The measuring instruments: serving policies side by side, on a virtual clock and on real engines."""
