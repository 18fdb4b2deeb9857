"""Models: names and architectures, where their weights are, what their denoisers take, LoRA files."""
