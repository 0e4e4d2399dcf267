"""Callbacks for trainers: Lightning, transformers, accelerate. Each file imports its package."""
