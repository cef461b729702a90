"""`python -m tests.models.zoo` writes the table into docs/models.md."""

from .table import DOCUMENT, document

DOCUMENT.write_text(document())
