"""The embedded model's pictures: fetch, render, caption, split."""
