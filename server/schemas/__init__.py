"""Request and response bodies, strict."""
