"""The paper's side: networks, data sets and training. It knows the method; the method does not know it."""
