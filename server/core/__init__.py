"""What a scheduler needs and no more: no HTTP, no torch, no device."""
