"""Pictures of any model: HPS v2.1, aesthetic score, CLIP score."""
