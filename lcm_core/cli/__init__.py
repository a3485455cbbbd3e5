"""One module for each command: `add_to(commands)` declares its options, `run(args)` does the work."""
