"""Memory of a running workload: which pages changed, how to read them, and when to stop copying them."""
