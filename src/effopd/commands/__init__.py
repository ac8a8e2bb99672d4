"""The command line: flags, checks and output of every command."""
