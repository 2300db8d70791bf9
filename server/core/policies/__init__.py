"""Which station runs next, and with whom: one small interface, several rules."""
