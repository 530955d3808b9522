"""The command line, installed as `morph.cli`."""
