"""From logits to text: sampling, stop conditions, streams."""
