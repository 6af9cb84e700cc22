"""Load over HTTP, and reports of it. Imports nothing else of this project."""
