"""ONNX Runtime's CUDA provider: decoders over lists of tokens, cache blocks on the GPU, calls recorded as CUDA graphs."""
