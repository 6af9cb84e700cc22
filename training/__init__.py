"""How weights come to be. Nothing that serves imports this."""
