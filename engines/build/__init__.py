"""From a plan to engines in the store: built, checked, timed. Serving imports none of it but `background`."""
