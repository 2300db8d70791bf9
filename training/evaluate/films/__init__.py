"""Films of any model, laid out for the benchmarks that measure them."""
