"""The herd itself: configuration, torch modules, operators, checkpoints, text and image processing.

This package imports nothing from the other rooms. ``model.config`` and ``model.processing`` are torch-free, so that
a runtime on an edge box can use them; everything else needs the ``train`` or ``export`` extras.
"""
