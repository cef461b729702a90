"""What the matrix test is made of: model kinds, axes with their covering sample, the float64 truth, and how a case runs."""
