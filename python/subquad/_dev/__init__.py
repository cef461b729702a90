"""Tools for people who work on subquad; not part of the installed package."""
