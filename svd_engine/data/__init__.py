"""Examples in files, and what an adapter has already seen of them."""
