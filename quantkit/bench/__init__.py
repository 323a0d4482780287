"""Before and after, one technique at a time, on the real vLLM."""
