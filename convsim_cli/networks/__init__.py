"""Networks by name, and checkpoints loaded into them and measured."""
