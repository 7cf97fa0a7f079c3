"""Read checkpoints: folders, the hub, .bin and .gguf files."""
