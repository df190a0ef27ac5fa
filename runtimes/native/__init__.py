"""Our own operators for ONNX Runtime on a CPU (docs/native.md)."""
