"""Compare methods, reproduce the paper, and analyse what was trained. Registers with the application as a plugin."""
