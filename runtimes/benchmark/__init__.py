"""How fast a bundle is: rates, and their roofline utilization on this machine."""
