"""Training of two ranks over a thin wire: two network namespaces joined by a token bucket."""
