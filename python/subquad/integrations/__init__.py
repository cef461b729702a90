"""Bridges to other libraries; each is importable without the others and imports its library only when used."""
