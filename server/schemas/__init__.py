"""Request and response bodies. Requests are pydantic models, strict; replies are msgspec structs, fast."""
