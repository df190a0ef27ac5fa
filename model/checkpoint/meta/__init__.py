"""Checkpoints in Meta's layout: ``consolidated.*.pth``, one file per tensor-parallel rank."""
