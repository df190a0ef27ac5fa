"""FP8 training: autocast, linear and grouped products, and amax histories."""
