"""The CUDA target on a device that computes nothing (docs/hollow-device.md).

``libraries`` builds the stand-ins for NVIDIA's libraries, ``device`` runs a graph over them, ``report`` is what
happened, ``decoder`` makes graphs and calls of decoders of any size without a weight.
"""
