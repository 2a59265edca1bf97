"""The command line: ``geyamux`` and ``python -m geyamux``.

Each command has a module with `SUMMARY`, `DESCRIPTION`, `EXAMPLES`, `add_arguments(parser)` and `run(options)`;
:mod:`.parser` puts them together, :mod:`.main` runs one. It uses what users of the library use, and speaks plain Yamux,
so that any peer can be the other end. Here alone is anything printed: answers to standard output, all else to standard
error.
"""
