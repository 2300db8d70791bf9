"""Serving policies over the same engines and the same traces: simulated, live, and against an outside server."""
