"""Changes layers before a run: LoRA and quantization."""
