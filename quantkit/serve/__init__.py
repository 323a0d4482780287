"""From quantized checkpoints to a vLLM serving bundle: its sizes, its flags, its files, its checks and its server."""
