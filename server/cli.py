"""The `sostenuto` command."""


def main() -> None:
    """Run the command line."""
