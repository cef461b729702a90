"""Faults of the cache of Superlinear attention and of its pages."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str) -> Where:
    tests = ("tests/ops/span_attention/test_cache.py", "tests/ops/span_attention/test_step.py")
    return Where(f"python/subquad/cache/{file}", tests, "not triton and not simt", ("stream",))


_CACHE = _of("superlinear.py")
_PAGES = _of("_pages.py")

FAULTS = (
    Fault("cache-spans-no-tokens", "state", _CACHE, "ends = torch.maximum(ends, start)", "pass"),
    Fault("cache-spans-room", "state", _CACHE, "ends, place = torch.minimum(ends, room),", "ends, place = ends,"),
    Fault("cache-spans-padding", "mask", _CACHE, "real = None if positions is None else real\n", "real = None\n"),
    Fault("cache-spans-max-len", "guard", _CACHE, "if most >= self.max_len:", "if most > self.max_len:"),
    Fault(
        "cache-spans-extend",
        "bounds",
        _CACHE,
        "column = -(-self.seq_lens // self.page_size)[:, None]",
        "column = (self.seq_lens // self.page_size)[:, None]",
    ),
    Fault(
        "cache-spans-fresh",
        "bounds",
        _CACHE,
        "(columns - 1) // self.page_size + 1",
        "max(1, columns // self.page_size)",
    ),
    Fault("cache-spans-start", "state", _CACHE, "start = torch.minimum(least, self.seq_lens)", "start = self.seq_lens"),
    Fault(
        "cache-spans-gap",
        "guard",
        _CACHE,
        "(real.any(1) & (least > self.seq_lens))",
        "(real.any(1) & (least > self.seq_lens + 1))",
    ),
    Fault(
        "cache-spans-follow",
        "guard",
        _CACHE,
        "(real & (beginning != least[:, None])).any()",
        "(real & (beginning < least[:, None])).any()",
    ),
    Fault("cache-spans-full-pages", "state", _CACHE, "unfilled = lens % size > 0", "unfilled = lens > 0"),
    Fault(
        "cache-spans-shared-page", "stale", _CACHE, "unfilled & ~(alone & ~same.tril(-1).any(1))", "unfilled & ~alone"
    ),
    Fault(
        "cache-spans-own-page",
        "state",
        _CACHE,
        "users[last.clamp(min=0)] == same.sum(1)",
        "users[last.clamp(min=0)] == 1",
        "a page that nobody keeps is free at once: one more copy, which the same pool always has room for",
    ),
    Fault("cache-spans-copy", "state", _CACHE, "write(x, (page,), x[last.clamp(min=0)], copied)", "pass"),
    Fault(
        "cache-spans-leak",
        "state",
        _CACHE,
        "users = users - counts(torch.where(copied, last, -1), pool.users.shape[0])",
        "pass",
    ),
    Fault("cache-spans-unchecked", "guard", _CACHE, "pool.check(wanted, (users == 0).sum())", "pass"),
    Fault("cache-spans-addresses", "stale", _CACHE, "if own.shape == value.shape:", "if own is value:"),
    Fault(
        "cache-spans-rollback",
        "state",
        _CACHE,
        "self.seq_lens - back.clamp(min=0)",
        "self.seq_lens - back.amax().clamp(min=0)",
    ),
    Fault("cache-spans-reset", "state", _CACHE, "self.seq_lens.masked_fill(mask", "self.seq_lens.masked_fill(~mask"),
    Fault("cache-spans-fork", "stale", _CACHE, "other.put(name, x.clone())", "other.put(name, x)"),
    Fault("cache-spans-kept", "bounds", _CACHE, "int(self.seq_lens.min())", "int(self.seq_lens.max())"),
    Fault("cache-spans-load-pool", "state", _CACHE, "self.reset()  # pages of a pool that forks go on with", "pass"),
    Fault(
        "cache-spans-load-users",
        "state",
        _CACHE,
        "self._pages.restart(counts(self.block_table, self.k.shape[0]))",
        "pass",
    ),
    Fault("cache-spans-load-alias", "stale", _CACHE, "state[name].to(value.device, copy=True)", "state[name]"),
    Fault("cache-pages-taken", "state", _PAGES, "self.users += counts(page, self.users.shape[0])", "pass"),
    Fault("cache-pages-none-left", "guard", _PAGES, "wanted & (rank <= self.left)", "wanted"),
    Fault("cache-pages-left", "state", _PAGES, "self.left -= given.sum()", "self.left -= wanted.sum()"),
    Fault(
        "cache-pages-free", "state", _PAGES, "used.argsort(stable=True)", "used.argsort(stable=True, descending=True)"
    ),
    Fault("cache-pages-write-place", "guard", _PAGES, "torch.where(some, index[pick], 0).long()", "index[pick].long()"),
    Fault(
        "cache-pages-write-value", "guard", _PAGES, "torch.where(some, value[pick], x[(0,) * len(at)])", "value[pick]"
    ),
)
