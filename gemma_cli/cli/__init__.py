"""The command line: Typer commands, one file each."""
