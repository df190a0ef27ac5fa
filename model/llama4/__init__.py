"""The torch modules of Llama 4 and the operators that they are written in."""
