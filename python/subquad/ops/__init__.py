"""Public functions: validate, choose a backend, call one operator, differentiate."""
