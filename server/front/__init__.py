"""The process that clients talk to: many connections, no device."""
