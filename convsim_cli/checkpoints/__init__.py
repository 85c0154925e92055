"""Checkpoint files: every format read and written behind one interface, replaced atomically."""
