"""Dense and block linear algebra that never raises on a matrix: what cannot be inverted comes back as NaN."""
