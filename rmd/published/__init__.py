"""Weights as others publish them: networks, single files and LoRAs into a checkpoint folder; hub names to folders."""
