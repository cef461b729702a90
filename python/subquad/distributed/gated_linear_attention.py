r"""Gated linear attention on shards: a state and a decay of every run of tokens, folded over all runs.

X_j is the state after run j, D_j = exp(sum of its gates), S_j its state from nothing:

    X_j = D_j X_(j-1) + S_j      forward: X_(j-1) enters the local operator as its initial state
    G_j = R_j + D_j G_(j+1)      backward: R_j = sum_t exp(b_t) scale q_t [dN_t, dD_t]^T is what run j's own outputs ask of the
                                 state that enters it; G_(j+1) enters the local backward as the gradient of X_j

D_j = 0 where a sequence begins inside the run. z is one more column of S.

S_j of a run is walked, before the local operator, or, on a CPU where that is faster, a by-product of the local operator from
nothing: then X_(j-1) is added to the outputs that it reaches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import _checks
from .._backends import backward_backend, has
from ..ops import _call
from ..ops._autograd import once_differentiable, without_autocast
from ..ops.gated_linear_attention import MAX_HEAD_DIM, _check_rows, _initial_state
from .agreement import checked
from .exchange import check_layout, check_tokens
from .layout import Run, SequenceLayout
from .scan import exclusive_scan, method_of

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_FORWARD, _LOCAL, _ENTER = (f"gated_linear_attention_{part}" for part in ("fwd", "local_fwd", "enter_"))
_FORGOTTEN = -104.0  # exp of it is 0 in float32


class _Call(NamedTuple):
    """What a call has besides tensors with gradients."""

    layout: SequenceLayout
    method: str
    scale: float
    eps: float
    normalize: bool
    states: int  # heads of the state
    backend: str
    device: str
    training: bool

    @property
    def rows(self) -> list[int]:
        """States of each of this rank's runs; 0 stands for the batch."""
        return [run.pieces if self.layout.packed else 0 for run in self.layout.mine]

    @property
    def splits(self) -> bool:
        """Whether the backend has the forward in two parts."""
        return has(_LOCAL, self.backend, self.device)

    def bounds(self, run: Run, device: torch.device) -> torch.Tensor | None:
        return torch.tensor(run.cuts, device=device) if self.layout.packed else None

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _call.call(
            _FORWARD, self.backend, *arguments
        )
        return found

    def local(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = _call.call(_LOCAL, self.backend, *arguments)
        return found


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    layout: SequenceLayout,
    method: str = "auto",
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
    eps: float = 1e-10,
    backend: str | None = None,
) -> tuple[torch.Tensor, State | None]:
    """`subquad.gated_linear_attention` of this rank's tokens: one exchange of states forward, one backward, whatever T.

    Args:
        q, k, v, g: [B, T of this rank, ...], as in `subquad.gated_linear_attention`.
        layout: where the tokens are, and the bounds of packed sequences.
        method: "all_gather" (one collective, all states on every rank), "scan" (two all-to-alls of one state each, whatever the
            number of ranks), "ring" (state from rank to rank; one run per rank), or "auto" by the number of ranks. Same bits.
        initial_state: of the sequences that begin on this rank, in the form of `subquad.gated_linear_attention`: for one sequence
            its rows are read by the owner of the first token alone, or by all where there is none; packed: one row for every
            piece of a sequence here, of which those that began elsewhere are not read.
        output_final_state: also return the state after this rank's last token; packed: after every piece, [pieces, ...]. The
            owner of the last token has the final state.
        scale, normalize, eps, backend: as in `subquad.gated_linear_attention`.

    Returns:
        (o [B, T of this rank, HQ, V] in q's dtype, state or None).

    Raises:
        TypeError, ValueError: as `subquad.gated_linear_attention`; numbers of tokens that are not the layout's; a method that the
            layout does not have; ranks that differ. On all ranks.
    """
    check_layout(layout)
    q, k, v = _call.autocast(q, k, v)
    known: dict[str, Any] = {}

    def check() -> None:
        for name, x in (("q", q), ("k", k), ("v", v), *(() if g is None else (("g", g),))):
            check_tokens(name, x, layout)
        states = _check_rows(q, k, v, g, 4)
        for name, flag in (("normalize", normalize), ("output_final_state", output_final_state)):
            _checks.flag(name, flag)
        number = q.shape[3] ** -0.5 if scale is None else _checks.number("scale", scale)
        count = sum(run.pieces for run in layout.mine) if layout.packed else q.shape[0]
        shape = (count, states, k.shape[3], v.shape[3])
        state = initial_state
        if state is not None and layout.packed:
            given = state[0] if isinstance(state, (tuple, list)) else state
            if isinstance(given, torch.Tensor) and given.dim() and given.shape[0] != count:
                raise ValueError(
                    f"initial_state: expected {count} rows, one per piece on this rank, got {given.shape[0]}"
                )
        s0, z0 = _initial_state(state, normalize, shape, q)
        chosen = method_of(method, layout)
        used = _call.choose("gated_linear_attention", q.device.type, backend, dtype=q.dtype)
        if used == "reference":
            raise ValueError("backend: expected 'native' or 'triton', got 'reference', which has no states to exchange")
        _checks.not_double("q", q, used)
        options = (number, _checks.number("eps", eps), normalize)
        needed = any(x is not None and x.requires_grad for x in (q, k, v, g, s0, z0))
        training = torch.is_grad_enabled() and needed
        call = _Call(layout, chosen, *options, states, used, q.device.type, training)
        known.update(call=call, s0=s0, z0=z0)

    def signature() -> dict[str, Any]:
        call = known["call"]
        shapes = {name: (x.shape[0], *x.shape[2:], x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        gate = None if g is None else (*g.shape[2:], g.dtype)
        options = (call.method, call.scale, call.eps, normalize)
        return {"op": "gated_linear_attention", "options": options, "g": gate, **shapes}

    checked(layout, signature, check)
    with without_autocast(q.device.type):
        o, s, z = _Parallel.apply(q, k, v, g, known["s0"], known["z0"], known["call"])
    if not output_final_state:
        return o, None
    if not normalize:
        return o, s
    return o, torch.cat([s, z.unsqueeze(-1)], -1) if isinstance(initial_state, torch.Tensor) else (s, z)


def _joined(s: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    """S with z, or zeros, as its last column."""
    return torch.cat([s, torch.zeros_like(s[..., :1]) if z is None else z.unsqueeze(-1)], -1)


def _apart(x: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return x[..., :-1].contiguous(), x[..., -1].contiguous() if normalize else None


def _log_decay(g: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """[B, HS, K, 1], the gates of these tokens summed; `like` is a state [B, HS, K, C]."""
    if g is None:
        return torch.zeros_like(like[..., :1])
    total = _sum_of_tokens(g).repeat_interleave(like.shape[1] // g.shape[2], 1)
    return (total if total.dim() == 3 else total.unsqueeze(-1).expand(like.shape[:3])).unsqueeze(-1)


def _sum_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """float32, over dimension 1. On a CPU parts are added up first: torch's own sum over a middle dimension took up to ten times
    as long, in 16 bits."""
    if x.device.type != "cpu":
        return x.sum(1, dtype=torch.float32)
    parts = x.split(max(256, -(-x.shape[1] // 64)), 1)
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total[:, : part.shape[1]] += part
    return total.sum(1)


class _Rows(NamedTuple):
    """[B, T, ...]"""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None

    def at(self, tokens: slice) -> _Rows:
        q, k, v = (x[:, tokens] for x in (self.q, self.k, self.v))
        return _Rows(q, k, v, None if self.g is None else self.g[:, tokens])

    def of(self, run: Run, piece: int) -> _Rows:
        """A run's rows of its first piece, 0, or its last, -1."""
        return self.at(slice(0, run.cuts[1]) if piece == 0 else slice(run.cuts[-2], run.cuts[-1]))


def _arguments(call: _Call, run: Run, rows: _Rows, begin: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The operator's seven tensors."""
    return (*rows, *_apart(begin, call.normalize), call.bounds(run, begin.device))


def _walk(call: _Call, rows: _Rows, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [B, HS, K, V + 1] after these tokens, and the logarithm [B, HS, K, 1] of what they leave of one before them."""
    _, k, v, g = rows
    s, z = _apart(begin, call.normalize)
    arguments = (_no_queries(k), k, v, g, s, z, None, 1.0, 1.0, call.normalize)
    if call.splits:
        _, _, s, z, _, left, _ = call.local(*arguments)
        decay = left.log().unsqueeze(-1)
    else:
        *_, s, z = call.forward(*arguments)
        decay = _log_decay(g, s)
    return _joined(s, z if call.normalize else None), decay


def _no_queries(k: torch.Tensor) -> torch.Tensor:
    """[B, T, 0, K]: with it the forward operator walks for the states alone."""
    return k.new_empty((*k.shape[:2], 0, k.shape[3]))


def _walk_back(
    call: _Call,
    q: torch.Tensor,
    g: torch.Tensor | None,
    grad_o: torch.Tensor,
    o: torch.Tensor,
    den: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """R [B, HS, K, V + 1] = sum_t exp(b_t) scale q_t [dN_t, dD_t]^T + exp(b) last: the same recurrence from the last token to the
    first, Y_t = exp(g_(t+1)) Y_(t+1) + scale q_t [dN_t, dD_t]^T, and R = exp(g_1) Y_1.

    Block by block, so that what is made of one stays in the cache. Query heads have a state each, which are added at the end.
    z has other weights than the sum of the keys of a walk, so it takes a column of the state.

    Args:
        q, g, grad_o, o, den: of these tokens, as the operator has them.
        last: [B, HS, K, V + 1].
    """
    (batch, tokens, heads, width), states = q.shape, last.shape[1]
    if tokens == 0:
        return last
    each, columns = heads // states, last.shape[3] - (not call.normalize)
    y = last.new_zeros((batch, states, each, width, columns))
    y[:, :, 0] = last[..., :columns]
    parts = [x.contiguous() for x in y.flatten(1, 2).split(MAX_HEAD_DIM, -1)]
    for low, high in _blocks(q):
        rows = slice(low, high)
        keys, values = q[:, rows].float().flip(1), _asked(call, grad_o[:, rows], o[:, rows], den[:, rows]).flip(1)
        gates = None
        if g is not None:  # of the token after, which the last one has not
            gates = g[:, low + 1 : high + 1].float().flip(1)
            if high == tokens:
                gates = torch.cat([torch.zeros_like(g[:, :1], dtype=torch.float32), gates], 1)
        pieces = zip(values.split(MAX_HEAD_DIM, -1), parts, strict=True)
        parts = [
            call.forward(_no_queries(keys), keys, piece, gates, part, None, None, 1.0, 1.0, False)[2]
            for piece, part in pieces
        ]
    y = torch.cat(parts, -1).unflatten(1, (states, each)).sum(2)
    if g is not None:
        y = y * _log_decay(g[:, :1], y).exp()
    return y if call.normalize else F.pad(y, (0, 1))


def _blocks(q: torch.Tensor) -> list[tuple[int, int]]:
    """Bounds from the last tokens to the first. On a CPU of 1 MiB in float32, but tokens enough to make up for moving states."""
    batch, tokens, heads, width = q.shape
    size = 64 * max(4, 2**12 // max(1, batch * heads * width)) if q.device.type == "cpu" else tokens
    return [(max(0, high - size), high) for high in range(tokens, 0, -size)]


def _asked(call: _Call, grad_o: torch.Tensor, o: torch.Tensor, den: torch.Tensor) -> torch.Tensor:
    """scale [dN, dD] float32 [B, T, HQ, V + 1], or scale dN where nothing is normalised."""
    if not call.normalize:
        return grad_o.float() * call.scale
    numerator = grad_o.float() * (call.scale / (den + call.eps)).unsqueeze(-1)
    return torch.cat([numerator, -(numerator * o).sum(-1, keepdim=True)], -1)


def _results_first(call: _Call, rows: _Rows) -> bool:
    """Whether these tokens are sooner done by results without what enters, and that afterwards, than by a walk and results.

    Where gates do not forget: a walk takes 0.45 of the time of results if each state has one query head. To add what enters
    takes as long in float32, but nobody waits for it; in 16 bits sums in float32 are moved too, and with more query heads a walk
    takes less. With gradients denominators have to be those of the states that the backward makes again, to the last bit: dq is
    a difference of what the two give.
    """
    if not call.splits:
        return False
    alone = rows.q.dtype is torch.float32 and rows.q.shape[2] == call.states
    return (alone and not call.training) or _soon_forgets(rows.g)


def _soon_forgets(g: torch.Tensor | None) -> bool:
    """Whether gates decay what enters to nothing within half of their tokens. Not looked for to the end where it is unlikely."""
    if g is None:
        return False
    total, seen, half = torch.zeros(()), 0, g.shape[1] // 2
    for part in g[:, :half].split(max(64, half // 16), 1):
        total = total + _sum_of_tokens(part)
        seen += part.shape[1]
        if bool((total < _FORGOTTEN).all()):
            return True
        if bool((total * (2 * half) > _FORGOTTEN * seen).any()):  # twice as fast from here on would not do
            return False
    return False


class _Results(NamedTuple):
    """Of a run; with the last three of one whose entering state is still to come."""

    o: torch.Tensor
    den: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    sums: torch.Tensor | None = None
    decay: torch.Tensor | None = None
    reach: torch.Tensor | None = None

    @classmethod
    def of(cls, call: _Call, run: Run, rows: _Rows, begin: torch.Tensor) -> _Results:
        return cls(*call.forward(*_arguments(call, run, rows, begin), call.scale, call.eps, call.normalize))

    @classmethod
    def before(cls, call: _Call, run: Run, rows: _Rows, begin: torch.Tensor) -> _Results | None:
        """Without what enters the run, where that is cheaper than a walk."""
        if not _results_first(call, rows.of(run, 0 if run.continues else -1)):
            return None
        if not run.continues:
            return cls.of(call, run, rows, begin)
        return cls(*call.local(*_arguments(call, run, rows, begin), call.scale, call.eps, call.normalize))

    def left(self, last: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_walk` gives."""
        s, z = self.s[last], self.z[last] if len(self.z) else None
        decay = torch.ones_like(s[..., 0]) if self.decay is None else self.decay[last]
        return _joined(s, z), decay.log().unsqueeze(-1)

    def entered(self, call: _Call, run: Run, rows: _Rows, x: torch.Tensor) -> _Results:
        """With x [1 or B, HS, K, V + 1] before the run's first piece."""
        if self.sums is None or self.decay is None or self.reach is None:
            return self
        head, first = slice(0, run.cuts[1]), slice(0, len(x))
        s, z = _apart(x, call.normalize)
        q, _, _, g = rows.of(run, 0)
        written = (self.o[:, head], self.den[:, head], self.sums[:, head], self.reach[first])
        _call.call(_ENTER, call.backend, *written, q, g, s, z, call.scale, call.eps)
        decay = self.decay[first]
        self.s[first] += torch.where(s == 0, 0.0, decay.unsqueeze(-1) * s)
        if z is not None:
            self.z[first] += torch.where(z == 0, 0.0, decay * z)
        return self


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None,
        s0: torch.Tensor | None,
        z0: torch.Tensor | None,
        call: _Call,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layout = call.layout
        runs, packed = layout.mine, layout.packed
        begins = _begins(call, q, k, v, s0, z0)
        first, last = (slice(0, 1), slice(-1, None)) if packed else (slice(None), slice(None))
        rows = [_Rows(q, k, v, g).at(run.local) for run in runs]
        ready = [_Results.before(call, *x) for x in zip(runs, rows, begins, strict=True)]
        messages = []
        for run, row, begin, known in zip(runs, rows, begins, ready, strict=True):
            own = begin[last]
            decay = torch.zeros_like(own[..., :1])
            if layout.hands_on(run):
                own, through = _walk(call, row.of(run, -1), own) if known is None else known.left(last)
                if run.passes:  # else nothing goes through it, either way
                    decay = through
            messages.append(torch.cat([own, decay], -1))
        entered = exclusive_scan(messages, layout, call.method)
        outputs, finals, saved = [], [], []
        for run, row, begin, known, x in zip(runs, rows, begins, ready, entered, strict=True):
            if run.continues:
                begin[first] = x
            results = _Results.of(call, run, row, begin) if known is None else known.entered(call, run, row, x)
            outputs.append(results.o)
            finals.append((results.s, results.z))
            saved += [results.den, results.o, *_arguments(call, run, row, begin)]
        ctx.save_for_backward(*saved, *(m[..., -1:] for m in messages))
        ctx.call, ctx.given = call, (s0 is not None, z0 is not None)
        ctx.set_materialize_grads(False)
        kept = finals if packed else finals[-1:]  # packed: of all pieces; else after the last token
        return _joined_rows(outputs), torch.cat([s for s, _ in kept]), torch.cat([z for _, z in kept])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: torch.Tensor | None, grad_s: torch.Tensor | None, grad_z: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        layout, normalize = call.layout, call.normalize
        runs, packed = layout.mine, layout.packed
        each = 9  # saved tensors of a run: den, o, the operator's seven
        saved = ctx.saved_tensors
        kept = [saved[each * i : each * (i + 1)] for i in range(len(runs))]
        decays = saved[each * len(runs) :]
        first, last = (slice(0, 1), slice(-1, None)) if packed else (slice(None), slice(None))
        upstream = _upstream(call, kept, grad_s, grad_z)
        if grad_o is None:
            tokens = sum(part[1].shape[1] for part in kept)
            grad_o = kept[0][1].new_zeros((kept[0][1].shape[0], tokens, *kept[0][1].shape[2:]))
        messages = []
        for run, (den, o, q, _, _, g, *_), decay, grad in zip(runs, kept, decays, upstream, strict=True):
            own = torch.zeros_like(grad[first])
            if run.continues:  # only the piece that came in hands gradients back
                head = slice(0, run.cuts[1])
                gates, asked = None if g is None else g[:, head], grad_o[:, run.local][:, head]
                own = _walk_back(call, q[:, head], gates, asked, o[:, head], den[:, head], grad[first])
            messages.append(torch.cat([own, decay], -1))
        entered = exclusive_scan(messages, layout, call.method, reverse=True)
        name = backward_backend(_FORWARD, call.backend, call.device)
        found: list[list[torch.Tensor]] = [[] for _ in range(6)]
        for run, (den, _, *tensors), grad, x in zip(runs, kept, upstream, entered, strict=True):
            grad = grad.clone()
            grad[last] += x
            ds, dz = _apart(grad, normalize)
            parts = _call.call(
                "gated_linear_attention_bwd", name, grad_o[:, run.local].contiguous(), ds, dz, den, *tensors, call.scale,
                call.eps, normalize,
            )  # fmt: skip
            for all_parts, part in zip(found, parts, strict=True):
                all_parts.append(part)
            if run.continues:  # what came in belongs to another run
                found[4][-1][first] = 0.0
                if normalize:
                    found[5][-1][first] = 0.0
        dq, dk, dv = (_joined_rows(x) for x in found[:3])
        dg = None if kept[0][5] is None else _joined_rows(found[3])
        ds, dz = (torch.cat(x) if packed else x[0] for x in found[4:])
        given_s, given_z = ctx.given
        return dq, dk, dv, dg, ds if given_s else None, dz if given_z else None, None


def _joined_rows(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _begins(
    call: _Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
) -> list[torch.Tensor]:
    """What stands before each run, [pieces or B, HS, K, V + 1]: the given states of sequences that begin here, else zeros."""
    layout = call.layout
    runs = layout.mine
    shape = (call.states, k.shape[3], v.shape[3] + 1)
    begins = [torch.zeros((n or q.shape[0], *shape), device=q.device) for n in call.rows]
    if s0 is not None:
        given = _joined(s0, z0)
        if layout.packed:
            begins = [x.clone() for x in given.split(call.rows)]
        elif runs[0].low == 0 and (runs[0].high > 0 or not layout.tokens):
            begins[0] = given
    for run, begin in zip(runs, begins, strict=True):
        if run.continues:
            begin[slice(0, 1) if layout.packed else slice(None)] = 0.0
    return begins


def _upstream(
    call: _Call, kept: list[tuple[Any, ...]], grad_s: torch.Tensor | None, grad_z: torch.Tensor | None
) -> list[torch.Tensor]:
    """The caller's gradient of the state after each run, z as its last column."""
    zeros = [_joined(torch.zeros_like(part[6]), None) for part in kept]
    if grad_s is None and grad_z is None:
        return zeros
    wide = torch.cat(zeros) if call.layout.packed else zeros[-1]
    if grad_s is not None:
        wide[..., :-1] += grad_s
    if grad_z is not None and call.normalize:
        wide[..., -1] += grad_z
    return list(wide.split(call.rows)) if call.layout.packed else [*zeros[:-1], wide]
