"""Bodies of requests as clients send them, one file per endpoint."""
