"""Operators of our own for ONNX Runtime's CPU provider, in C++: sources, compiler and the compiled library."""
