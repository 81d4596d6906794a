"""The demo: a small GPT trained on real text, at any stage, with a proof that sharding changed no bit.

Ordinary code over the public API: it never reaches into the engine, and no other room needs it.
"""
