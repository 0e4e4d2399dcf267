"""Dense and block linear algebra that returns NaN, and raises nothing, where a matrix cannot be inverted."""
