"""The version, alone in a file: the wheel's metadata, every manifest and `import slmdeploy` read it from here.

It imports nothing, so that a build backend and a module of any layer can read it.
"""

__version__ = "0.1.0"
