"""Training: data, objectives, distillation, trainer and recipes."""
