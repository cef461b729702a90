"""From a checked call to its operator: autocast, backend, layout, reference, gradients. `run` for results, `step` for states.

The only user of the operators' handles. A public function casts (`autocast`), checks what is particular to it, and ends in `run`
or `step` with the arguments of its operator in the order of the schema; what else happens to a call is stated in the op's
contract and done here, for all ops alike. Functions of a few microseconds ask `at_once` first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _checks
from .._backends import SubquadWarning, backward_backend, resolve, settled
from ..contract import CONTRACTS, HANDLES, OPERATORS, STEM_OF
from ._autograd import autocasts, once_differentiable, without_autocast
from ._schema import GRADIENTS, PLAIN, SIGNATURES, Signature

_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
GradientHook = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
_HOOKS: dict[str, GradientHook] = {}
DTENSORS: dict[str, Callable[..., Any]] = {}  # by function; `subquad.distributed` fills it


# --- without the checks ----------------------------------------

CHECKED = ("native", "simt")  # they refuse all bad arguments themselves, before they write: csrc/ops/*/arguments.h
_taken: dict[str, set[tuple[type, ...]]] = {operator: set() for operator in OPERATORS}  # types that a signature takes


def at_once(operator: str, backend: str | None, prepare: Callable[..., tuple[Any, ...]], *given: Any) -> Any:
    """The results of an operator, called with unchecked arguments; None where the call has to go the long way.

    That is where more is to be done than to call a kernel of C++ (gradients, autocast, a compiler, `torch.func`, tensors of other
    classes or layouts), and where something was refused: the checks in Python then say what. Nothing was written before that.

    Args:
        operator: its name, `<stem>_fwd` or, of a state, one that ends in an underscore.
        backend: what the caller asked for.
        prepare: makes the operator's arguments, in the order of the schema, of `given`. It may raise anything, but checks what
            operators cannot see: names of options, numbers of indices.
        given: what the caller gave, the tensor that says the device and dtype first.
    """
    first = given[0]
    if (
        torch.compiler.is_compiling()
        or type(first) not in PLAIN
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    signature, stem, on_cpu = SIGNATURES[operator], STEM_OF[operator], first.is_cpu
    few = not on_cpu and CONTRACTS[stem].few > 0
    if few and not signature.written:  # whose tokens nobody has counted yet; those of a step are few
        return None
    name = settled(stem, "cpu" if on_cpu else "cuda", backend, few)
    if name not in CHECKED or not (on_cpu or first.is_cuda) or first.dtype is torch.float64:
        return None
    try:
        arguments = prepare(*given)
        types = tuple(map(type, arguments))
        if types not in _taken[operator]:
            if not signature.takes(types):
                return None
            _taken[operator].add(types)
        differentiates = torch.is_grad_enabled()
        for i in signature.tensors:
            x = arguments[i]
            # A meta tensor would take the call to the fake kernel.
            if x is not None and (
                x.is_meta
                or (differentiates and x.requires_grad)
                or not (x.is_contiguous() or i not in signature.contiguous)
            ):
                return None
        return HANDLES[name][operator](*arguments)
    except Exception:  # whatever it was, the checks have better words, or it comes again
        return None


# --- before the checks ----------------------------------------


def autocast(*values: Any, to: Any = None) -> tuple[Any, ...]:
    """The operands as they are, or under autocast in its dtype (in that of `to`, a state that is written to).

    Like torch's own products: float32 and the 16-bit types are cast, float64, integers and what is no tensor are not.
    """
    leader = values[0] if to is None else to
    if not isinstance(leader, torch.Tensor) or not autocasts(leader.device.type):
        return values
    dtype = torch.get_autocast_dtype(leader.device.type) if to is None else to.dtype
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            _checks.memory(f"operand {i}", value)
    return tuple(v.to(dtype) if isinstance(v, torch.Tensor) and v.dtype in _CASTABLE else v for v in values)


def on_parts(function: str, x: object) -> Callable[..., Any] | None:
    """What is called in the place of a function whose training is no operator where x is a DTensor, if anything is."""
    return DTENSORS.get(function) if type(x).__name__ == "DTensor" else None


# --- results ----------------------------------------


def run(
    operator: str,
    backend: str | None,
    arguments: Sequence[Any],
    reference: Callable[..., Any],
    *,
    tokens: int | None = None,
    backward_only: tuple[Any, ...] = (),
    prepare: Callable[[str, list[Any]], None] | None = None,
) -> Any:
    """The results of a forward operator, differentiable where it is.

    Args:
        operator: its name, `<stem>_fwd`.
        backend: what the caller asked for.
        arguments: checked, in the order of the schema.
        reference: takes the same arguments and gives the same results, in plain PyTorch. It also computes `by_definition`.
        tokens: how many tokens the call has, for the contract's `few`; None where that plays no part.
        backward_only: arguments that only the backward operator has.
        prepare: called with the backend's name and the arguments, some of which a backend may need filled in.

    Raises:
        TypeError: float64 for a kernel that was asked for.
        ValueError: a backend that cannot run.
    """
    signature = SIGNATURES[operator]
    first = arguments[0]
    device = first.device.type
    training = False
    if torch.is_grad_enabled():
        training = any(arguments[i] is not None and arguments[i].requires_grad for i in signature.differentiable)
    name = choose(STEM_OF[operator], device, backend, tokens, training, first.dtype)
    if autocasts(device):
        with without_autocast(device):
            return _results(operator, name, arguments, signature, reference, training, backward_only, prepare)
    return _results(operator, name, arguments, signature, reference, training, backward_only, prepare)


def _results(
    operator: str,
    name: str,
    arguments: Sequence[Any],
    signature: Signature,
    reference: Callable[..., Any],
    training: bool,
    backward_only: tuple[Any, ...],
    prepare: Callable[[str, list[Any]], None] | None,
) -> Any:
    """`run` with its backend chosen, outside autocast."""
    if name == "reference" or by_definition(arguments):
        return _contiguous(reference(*arguments, *backward_only))
    _checks.not_double(signature.names[0], arguments[0], name)
    prepared = _laid_out(arguments, signature)
    if prepare is not None:
        prepare(name, prepared)
    if training and OPERATORS[operator].backward is not None:
        return _Differentiable.apply(operator, name, backward_only, *prepared)
    return HANDLES[name][operator](*prepared)


def choose(
    stem: str,
    device: str,
    backend: str | None,
    tokens: int | None = None,
    training: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend of a call; see `_backends.resolve`."""
    few = False
    if device == "cuda" and tokens is not None and not training:
        few = bool(tokens <= CONTRACTS[stem].few)  # of a traced size: now, for good
    return resolve(stem, device, backend, few, dtype)


def by_definition(arguments: Sequence[Any]) -> bool:
    """Whether PyTorch itself must see what is computed: under `torch.func` transforms, and with tangents of forward-mode
    differentiation, which kernels do not know and would drop."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments)


def call(operator: str, backend: str, *arguments: Any) -> Any:
    """One operator of one backend, as it is: for autograd Functions that an op has of its own."""
    return HANDLES[backend][operator](*arguments)


def _contiguous(results: Any) -> Any:
    if isinstance(results, tuple):
        return tuple(_contiguous(x) for x in results)
    return results if results is None else results.contiguous()


def _laid_out(arguments: Sequence[Any], signature: Signature) -> list[Any]:
    """The arguments with the strides that the contract promises to kernels."""
    laid_out = list(arguments)
    for i in signature.contiguous:
        if laid_out[i] is not None and not laid_out[i].is_contiguous():
            laid_out[i] = _dense(signature.names[i], laid_out[i])
    for i in signature.strided:
        x = laid_out[i]
        if x is not None and x.stride(-1) != 1 and x.shape[-1] != 1:
            laid_out[i] = _dense(signature.names[i], x)
    return laid_out


def _dense(name: str, x: torch.Tensor) -> torch.Tensor:
    _checks.memory(name, x)
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves what has no elements as it is


# --- gradients ----------------------------------------


def gradient_hook(operator: str) -> Callable[[GradientHook], GradientHook]:
    """Register what a backward operator leaves to PyTorch: (its results, its arguments) -> gradients, all by name."""

    def register(hook: GradientHook) -> GradientHook:
        _HOOKS[operator] = hook
        return hook

    return register


class _Differentiable(torch.autograd.Function):
    """Any forward operator whose contract names a backward; arguments and gradients are matched by name."""

    @staticmethod
    def forward(ctx: Any, operator: str, backend: str, backward_only: tuple[Any, ...], *arguments: Any) -> Any:
        results = HANDLES[backend][operator](*arguments)
        gradient = GRADIENTS[operator]
        outputs = results if isinstance(results, tuple) else (results,)
        saved = [arguments[i] for i in gradient.saved_arguments] + [outputs[i] for i in gradient.saved_outputs]
        ctx.save_for_backward(*saved)
        ctx.constants = tuple(arguments[i] for i in gradient.constants)
        ctx.call = (operator, backend, backward_only)
        ctx.zeros = ()
        if type(outputs[0]) is not torch.Tensor:  # the engine would make plain zeros, which a DTensor does not go with
            ctx.set_materialize_grads(False)
            ctx.zeros = tuple((x.shape, x.dtype) for x in outputs)
        ctx.given = tuple(argument is not None for argument in arguments)
        # A state of no taps is as absent as one that nobody asked for.
        ctx.absent = tuple(
            i for i, switch in gradient.switches.items() if not arguments[switch] or outputs[i].shape[-1] == 0
        )
        if gradient.plain_outputs:
            ctx.mark_non_differentiable(*(outputs[i] for i in gradient.plain_outputs))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        operator, backend, backward_only = ctx.call
        gradient = GRADIENTS[operator]
        saved = ctx.saved_tensors
        if ctx.zeros:
            shaped = zip(grads, ctx.zeros, strict=True)
            grads = tuple(saved[0].new_zeros(x[0], dtype=x[1]) if grad is None else grad for grad, x in shaped)
        upstream = [None if i in ctx.absent else grad.contiguous() for i, grad in enumerate(grads)]
        named = {"grad": upstream, "saved": saved, "constant": ctx.constants, "extra": backward_only}
        values = [named[source][i] for source, i in gradient.sources]
        name = backward_backend(operator, backend, saved[0].device.type)
        results = HANDLES[name][gradient.operator](*values)
        found = dict(zip(gradient.results, results if isinstance(results, tuple) else (results,), strict=False))
        if operator in _HOOKS:
            found = _HOOKS[operator](found, dict(zip(gradient.names, values, strict=True)))
        by_argument = tuple(
            found.get(argument) if given else None
            for argument, given in zip(gradient.arguments, ctx.given, strict=True)
        )
        return (None, None, None, *by_argument)


# --- states ----------------------------------------


def step(
    operator: str,
    backend: str | None,
    arguments: Sequence[Any],
    reference: Callable[..., Any],
    *,
    hint: str = "",
) -> Any:
    """The result of an operator that moves states on, in place. One contract for all of them:

    - no argument may need a gradient: it would be lost;
    - a state shares memory neither with itself, another state nor any other argument;
    - states may have any strides. Kernels that want them dense work on a copy, which is said once (and refused where nothing can
      be said, under torch.compile);
    - nothing is written before everything has been checked.

    Args:
        operator: its name, which ends in an underscore.
        backend: what the caller asked for.
        arguments: checked, in the order of the schema.
        reference: takes the same arguments; returns the result followed by the states after it, in order.
        hint: of the message for an argument that needs a gradient.

    Raises:
        TypeError: float64 for a kernel that was asked for.
        ValueError: an argument that needs a gradient, a state that shares memory, a backend that cannot run.
    """
    signature = SIGNATURES[operator]
    if torch.is_grad_enabled():
        for i in signature.tensors:
            _checks.no_gradient(signature.names[i], arguments[i], hint)
    _checks.unshared(signature.names, arguments, signature.tensors, signature.written)
    device = arguments[0].device.type
    name = choose(STEM_OF[operator], device, backend, tokens=1, dtype=arguments[0].dtype)
    if torch.is_grad_enabled() or autocasts(device):
        with torch.no_grad(), without_autocast(device):
            return _move_on(operator, name, arguments, signature, reference)
    return _move_on(operator, name, arguments, signature, reference)


def _move_on(
    operator: str, name: str, arguments: Sequence[Any], signature: Signature, reference: Callable[..., Any]
) -> Any:
    """`step` after its checks, outside autocast and without gradients."""
    if name == "reference" or by_definition(arguments):
        result, *after = reference(*arguments)
        for i, state in zip((i for i in signature.written if arguments[i] is not None), after, strict=True):
            arguments[i].copy_(state)
        return result
    _checks.not_double(signature.names[0], arguments[0], name)
    prepared = _laid_out(arguments, signature)
    copied = [i for i in signature.written if prepared[i] is not arguments[i]]
    if copied and torch.compiler.is_compiling():  # which could neither warn nor see what memory states share
        name_of = signature.names[copied[0]]
        raise ValueError(f"{name_of}: expected a contiguous tensor under torch.compile, for it is updated in place")
    if copied:
        _warn_of_copies(operator, signature.names[copied[0]])
    result = HANDLES[name][operator](*prepared)
    for i in copied:
        arguments[i].copy_(prepared[i])
    return result


_warned: set[str] = set()


def _warn_of_copies(operator: str, argument: str) -> None:
    if operator not in _warned:
        _warned.add(operator)
        warnings.warn(
            f"subquad: {operator}: {argument} is not contiguous and is copied at every step, there and back; keep it contiguous",
            SubquadWarning,
            stacklevel=5,
        )
