"""Turns a build into what is shipped: a folder that runs by itself, and the archive that carries it."""
