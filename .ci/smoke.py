"""Does an installed subquad compute, on the backend named? Run outside the checkout."""

from __future__ import annotations

import sys
import warnings

import torch

import subquad

expected = sys.argv[1]
assert "site-packages" in subquad.__file__, subquad.__file__
torch.manual_seed(0)
x, gate, up, down = torch.randn(3, 64), torch.randn(96, 64), torch.randn(96, 64), torch.randn(96, 64).t()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = subquad.cats_mlp(x, gate, up, down, 0.3)
warned = [str(w.message) for w in caught if issubclass(w.category, subquad.SubquadWarning)]
assert bool(warned) == (expected == "reference"), warned
expected_y = subquad.cats_mlp(x, gate, up, down, 0.3, backend="reference")
torch.testing.assert_close(y, expected_y, rtol=0.0, atol=1e-5 * float(expected_y.abs().max()))
chosen = subquad.backends()["cats_mlp"]["cpu"]["native"]
assert (chosen == "available") == (expected == "native"), chosen
print(f"subquad {subquad.__version__} computes on {expected}; warnings: {warned or 'none'}")
