"""The command line: one module for every subcommand of `senri-hf`."""
