"""lit-qlora: fine-tune Llama 2 in 4-bit with LoRA, as a PyTorch Lightning project."""
