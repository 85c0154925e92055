"""The paper's experiments: published numbers, and the runs that check them."""
