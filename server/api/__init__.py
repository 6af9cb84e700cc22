"""HTTP endpoints, one family a file."""
