"""What a canonical graph is lowered to."""
