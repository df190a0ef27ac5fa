"""What one GPU can prove of herdgraph in nine minutes, in order of value. ``plan.py`` is the list."""
