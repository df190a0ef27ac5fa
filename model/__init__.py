"""What Llama 4 is: configuration, torch modules, operators, checkpoints, text and image processing, training.

This package imports none of the other packages. ``model.config`` and ``model.processing`` are torch-free, so that a
runtime on an edge box can use them; everything else needs the ``build`` or the ``train`` extra.
"""
