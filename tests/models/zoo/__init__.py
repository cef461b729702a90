"""Tiny models of every kind that transformers has: what each is compared in, and the table of them in docs/models.md."""
