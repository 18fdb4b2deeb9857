"""What a model does and how good its pictures are: measures on tensors, without a download. Import the modules by name."""
