"""How much faster a cascade is than its teacher. Needs torch and diffusers only: a bare GPU machine has no more."""
