"""HTTP and conversations. Imports neither torch nor anything of the engine that does."""
