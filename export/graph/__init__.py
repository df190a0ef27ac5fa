"""The canonical graph: its capture, the names in it, its reference function bodies, and a builder of nodes."""
