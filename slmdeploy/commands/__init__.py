"""The subcommands: each parses, calls one function and prints; cli.py puts them together."""
