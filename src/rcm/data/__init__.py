"""The tiny world, captions and suites of prompts, and shards of latents."""
