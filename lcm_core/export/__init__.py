"""Models put where other programs look for them: one module per program."""
