"""A blind study: two sources side by side on a page, and what its answers say."""
