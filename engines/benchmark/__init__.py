"""Measured speed: the teacher, the cascades and their engines, side by side in one run.

Needs torch and diffusers only (`python -m engines.benchmark.speedup --help`): a bare GPU machine has no more.
"""
