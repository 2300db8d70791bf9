"""Stations, policy, admission and the one thread that owns the device."""
