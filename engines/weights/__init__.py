"""One copy of a component's weights, and how what engines read is made of it."""
