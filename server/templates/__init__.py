"""Chat templates as data, and how messages are rendered with them."""
