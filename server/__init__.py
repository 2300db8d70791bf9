"""The HTTP server: OpenAI's image surface over a stage-wise scheduler.

``server`` imports :mod:`rmd` and :mod:`engines` only; a checkpoint folder is all it shares with training.
"""
