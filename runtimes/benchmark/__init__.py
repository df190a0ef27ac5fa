"""How fast a bundle is, as shares of what the machine can do."""
