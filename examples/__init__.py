"""Programs to read and to run from a checkout."""
