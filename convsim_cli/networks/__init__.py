"""Networks by name, and checkpoints loaded into them."""
