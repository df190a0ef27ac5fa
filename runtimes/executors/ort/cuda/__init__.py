"""ONNX Runtime's CUDA provider: lists of tokens, cache blocks on the GPU, calls recorded as CUDA graphs."""
