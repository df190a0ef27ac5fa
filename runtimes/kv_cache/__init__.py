"""Keys and values of sequences: buffers, the memory they live in, and batches."""
