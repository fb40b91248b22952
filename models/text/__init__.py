"""Item text -> LLM embedding: prompts, packed encoding, SCFT."""
