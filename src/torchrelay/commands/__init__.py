"""The commands of the command line, a file each: its help, its options, and `run`, which calls what a user can call.

A command imports what needs torch inside `run`, so that `--help` and wrong usage are answered at once.
"""
