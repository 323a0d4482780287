"""What a model takes of a machine: bytes of weights and cache, operations, and so seconds."""
