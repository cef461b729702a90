"""What `_call` reads off the schemas: which arguments are what, and where a backward operator takes its arguments from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..contract import HANDLES, OPERATORS


@dataclass(frozen=True)
class Signature:
    """Places of an operator's arguments.

    Attributes:
        names: of all arguments.
        tensors: of those that are tensors, given or not.
        written: that it writes to.
        differentiable: that have gradients.
        contiguous, strided: see `Operator`.
        kinds: of each argument the types that operators take as they are; of a tensor none but torch's own.
    """

    names: tuple[str, ...]
    tensors: tuple[int, ...]
    written: tuple[int, ...]
    differentiable: tuple[int, ...]
    contiguous: tuple[int, ...]
    strided: tuple[int, ...]
    kinds: tuple[tuple[type, ...], ...]

    def takes(self, types: tuple[type, ...]) -> bool:
        """Whether arguments of these types are what the schema wants, with nothing to convert and nobody to ask."""
        return len(types) == len(self.kinds) and all(t in kind for t, kind in zip(types, self.kinds, strict=True))


PLAIN = (torch.Tensor, torch.nn.Parameter)
_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": PLAIN,
    "Optional[Tensor]": (*PLAIN, type(None)),
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
}


def _signature(operator: str) -> Signature:
    spec, arguments = OPERATORS[operator], HANDLES["native"][operator]._schema.arguments
    names = tuple(a.name for a in arguments)
    tensors = tuple(i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]"))
    declared = {*spec.differentiable, *spec.strided, *spec.as_given}
    if not declared <= set(names):
        raise ValueError(f"{operator}: the contract names {sorted(declared - set(names))}, which the schema has not")
    return Signature(
        names,
        tensors,
        tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write),
        tuple(names.index(n) for n in spec.differentiable),
        tuple(i for i in tensors if names[i] not in (*spec.strided, *spec.as_given)),
        tuple(names.index(n) for n in spec.strided),
        tuple(_KINDS.get(str(a.type), ()) for a in arguments),
    )


SIGNATURES: dict[str, Signature] = {name: _signature(name) for name in OPERATORS}


@dataclass(frozen=True)
class Gradient:
    """How a forward operator's gradients are computed.

    Attributes:
        operator: the backward operator.
        arguments: names of the forward's arguments, which gradients are returned for.
        names: names of the backward's arguments.
        sources: of each of them ("grad" | "saved" | "constant" | "extra", index there).
        switches: by number of a result, the place of the forward's argument that says whether it exists.
        saved_arguments, saved_outputs: places of what is saved, in this order.
        constants: places of the forward's arguments that are no tensors.
        plain_outputs: places of results without a gradient.
        results: names of the backward's results: arguments of the forward, unless the backward's contract names them.
    """

    operator: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    sources: tuple[tuple[str, int], ...]
    switches: dict[int, int]
    saved_arguments: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    constants: tuple[int, ...]
    plain_outputs: tuple[int, ...]
    results: tuple[str, ...]


def _gradient(operator: str) -> Gradient:
    spec, signature = OPERATORS[operator], SIGNATURES[operator]
    assert spec.backward is not None
    backward = OPERATORS[spec.backward]
    arguments = HANDLES["native"][spec.backward]._schema.arguments
    wanted = [a.name for a in arguments]
    saved_arguments = [i for i in signature.tensors if signature.names[i] in wanted]
    saved_outputs = [i for i, n in enumerate(spec.outputs) if n in wanted]
    constants = [i for i, n in enumerate(signature.names) if n in wanted and i not in saved_arguments]
    sources: list[tuple[str, int]] = []
    extra = 0
    for a in arguments:
        output = a.name.removeprefix("grad_")
        if a.name.startswith("grad_") and output in spec.outputs:
            sources.append(("grad", spec.outputs.index(output)))
        elif a.name in spec.outputs:
            sources.append(("saved", len(saved_arguments) + saved_outputs.index(spec.outputs.index(a.name))))
        elif a.name in signature.names:
            place = signature.names.index(a.name)
            kind, among = ("saved", saved_arguments) if place in saved_arguments else ("constant", constants)
            sources.append((kind, among.index(place)))
        else:
            sources.append(("extra", extra))
            extra += 1
    with_gradient = {index for source, index in sources if source == "grad"}
    named = backward.outputs != ("out",)
    return Gradient(
        spec.backward,
        signature.names,
        tuple(wanted),
        tuple(sources),
        {spec.outputs.index(output): signature.names.index(switch) for output, switch in spec.switches.items()},
        tuple(saved_arguments),
        tuple(saved_outputs),
        tuple(constants),
        tuple(i for i in range(len(spec.outputs)) if i not in with_gradient),
        backward.outputs if named else spec.differentiable,
    )


GRADIENTS: dict[str, Gradient] = {name: _gradient(name) for name, op in OPERATORS.items() if op.backward is not None}
