"""HTTP shapes and routes. No scheduling happens here."""
