"""The command line: one file per command group; arguments in, a printed result and an exit code out."""
