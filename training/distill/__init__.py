"""Distillation of any backbone: a teacher folder and prompts in, a checkpoint folder out."""
