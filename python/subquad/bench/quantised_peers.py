"""Other libraries' products with weights in few bits, for the benchmarks: torch's own, onnxruntime's, ggml's.

None is a dependency; what cannot be imported is named by `absent`. ggml and onnxruntime get the numbers of the sample's groups,
bit for bit, and round activations to 8 bits; torch's int8 has a scale for each row and rounds the weights anew. "ggml" has the
kernels of plain buffers, "ggml repacked" those of rows that it interleaves, in the formats that it does so. "ggml Q4_K" is
repacked, too, and quantises the sample's numbers anew, in blocks of 256: on gaussian weights its own differ from them by 4 %.
CATS's peers are dense: three products, the down projection quantised along the neurons.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.quantised_linear import dequantise, quantise
from ..reference.quantised_linear import FORMATS, GROUP, unpack
from ..testing.spec import Sample

Product = Callable[[torch.Tensor], torch.Tensor]
Library = Callable[[torch.Tensor, str], Product | None]  # the bytes of a weight and their format


# --- torch ----------------------------------------


def _torch_int8(weight: torch.Tensor, format: str) -> Product | None:
    if format != "int8":
        return None
    dense = dequantise(weight, format)
    scale = dense.abs().amax(1) / 127
    codes, scale = (dense / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), codes, scale)


def _torch_int4(weight: torch.Tensor, format: str) -> Product | None:
    if format == "int8":
        return None
    codes, scale, minimum = unpack(weight, format)
    # (code - 8) * scale + zero, of groups of 32: these are the sample's numbers but for bfloat16 scales.
    zero = torch.zeros_like(scale.float()) if minimum is None else minimum.float() + 8 * scale.float()
    numbers = torch.stack((scale.float(), zero), -1).transpose(0, 1).contiguous().bfloat16()
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, numbers)


def _torch_dynamic(weight: torch.Tensor, format: str) -> Product | None:
    if format != "int8":
        return None
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(dequantise(weight, format), requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape
    with warnings.catch_warnings():  # torch 2.13 announces their end
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)
    return lambda x: quantised(x.float())


# --- onnxruntime ----------------------------------------


def _onnxruntime(weight: torch.Tensor, format: str) -> Product | None:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None or FORMATS[format].minimum:
        return None
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    codes, scale, _ = unpack(weight, format)
    (rows, groups), bits = scale.shape, FORMATS[format].bits
    if bits == 8:  # unsigned, 128 stands for 0
        data = (codes + 128).to(torch.uint8)
    else:  # neighbours share a byte
        low, high = codes.unflatten(-1, (GROUP // 2, 2)).unbind(-1)
        data = (low | high << 4).to(torch.uint8)
    tensors = {"B": data, "scales": scale.float().flatten() if bits == 4 else scale.float()}
    node = onnx.helper.make_node(
        "MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft",
        K=groups * GROUP, N=rows, bits=bits, block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        [node], "product", [value("A", shape=["M", groups * GROUP])], [value("Y", shape=["M", rows])],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )  # fmt: skip
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # its threads would take the next candidate's cores
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"A": x.float().numpy()})[0])


# --- ggml ----------------------------------------

_GGML_TYPES = {"int8": 8, "int4": 2, "int4_min": 3}  # Q8_0, Q4_0, Q4_1: what has the very numbers of our formats
_GGML_Q4_K = 12


# Packages that bring ggml's libraries, and where; the first is built for the machine that it is installed on.
_GGML_PLACES = {"llama_cpp": "lib", "libggml": "lib64"}


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _ggml_silence(level: int, text: bytes, data: int) -> None:
    """Its log, which would have a line for every weight that is repacked."""


class _Init(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def _ggml_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """(base, cpu) of llama-cpp-python or libggml-python, None without them."""
    name = next((name for name in _GGML_PLACES if find_spec(name) is not None), None)
    found = None if name is None else find_spec(name)
    if name is None or found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / _GGML_PLACES[name]
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for library, name, result, *arguments in (
        (base, "ggml_log_set", None, pointer, pointer),
        (base, "ggml_init", pointer, _Init),
        (base, "ggml_free", None, pointer),
        (base, "ggml_blck_size", integer, ctypes.c_int),
        (base, "ggml_row_size", size, ctypes.c_int, integer),
        (base, "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, integer, integer, integer, pointer),
        (base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, integer, integer),
        (base, "ggml_mul_mat", pointer, pointer, pointer, pointer),
        (base, "ggml_get_data", pointer, pointer),
        (base, "ggml_new_graph", pointer, pointer),
        (base, "ggml_build_forward_expand", None, pointer, pointer),
        (base, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer),
        (base, "ggml_backend_get_device", pointer, pointer),
        (base, "ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer),
        (base, "ggml_backend_reg_dev_get", pointer, pointer, size),
        (base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p),
        (base, "ggml_backend_cpu_buffer_type", pointer),
        (base, "ggml_backend_buft_name", ctypes.c_char_p, pointer),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer),
        (base, "ggml_backend_buffer_free", None, pointer),
        (base, "ggml_backend_tensor_set", None, pointer, pointer, size, size),
        (cpu, "ggml_backend_cpu_reg", pointer),
        (cpu, "ggml_backend_cpu_init", pointer),
        (cpu, "ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int),
        (cpu, "ggml_cpu_init", None),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    base.ggml_log_set(_ggml_silence, None)
    cpu.ggml_cpu_init()
    return base, cpu


@functools.cache
def _ggml_backend(threads: int) -> Any:
    libraries = _ggml_libraries()
    assert libraries is not None
    backend = libraries[1].ggml_backend_cpu_init()
    libraries[1].ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


@functools.cache
def _ggml_buffers(repacked: bool) -> int | None:
    """The type of the buffers that weights lie in, None where the library does not repack."""
    libraries = _ggml_libraries()
    assert libraries is not None
    base, cpu = libraries
    if not repacked:
        return int(base.ggml_backend_cpu_buffer_type())
    registry = cpu.ggml_backend_cpu_reg()
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address is None:
        return None
    extra: Any = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types = itertools.takewhile(bool, extra(base.ggml_backend_reg_dev_get(registry, 0)))  # a null pointer ends them
    return next((type for type in types if base.ggml_backend_buft_name(type) == b"CPU_REPACK"), None)


def _ggml_product(blocks: torch.Tensor, type: int, columns: int, repacked: bool) -> Product | None:
    """Products with rows of ggml's blocks, None where ggml has no kernel for them in such buffers."""
    libraries, buffers = _ggml_libraries(), _ggml_buffers(repacked)
    assert libraries is not None
    if buffers is None:
        return None
    (base, _), rows, backend = libraries, blocks.shape[0], _ggml_backend(torch.get_num_threads())
    context = base.ggml_init(_Init(1 << 14, None, True))
    left = base.ggml_new_tensor_2d(context, type, columns, rows)
    buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffers)
    example = base.ggml_mul_mat(context, left, base.ggml_new_tensor_2d(context, 0, columns, 1))
    if not base.ggml_backend_dev_supports_op(base.ggml_backend_get_device(backend), example):
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)
        return None
    base.ggml_backend_tensor_set(left, blocks.data_ptr(), 0, blocks.nbytes)  # this is what repacks

    @functools.cache
    def prepared(tokens: int) -> Product:
        context = base.ggml_init(_Init(4 * tokens * (columns + rows) + (1 << 20), None, False))
        right = base.ggml_new_tensor_2d(context, 0, columns, tokens)
        result, graph = base.ggml_mul_mat(context, left, right), base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, result)
        place = (ctypes.c_float * (tokens * rows)).from_address(base.ggml_get_data(result))
        y, into = torch.frombuffer(place, dtype=torch.float32).view(tokens, rows), base.ggml_get_data(right)

        def run(x: torch.Tensor) -> torch.Tensor:
            ctypes.memmove(into, x.data_ptr(), x.nbytes)
            base.ggml_backend_graph_compute(backend, graph)
            return y

        return run

    def product(x: torch.Tensor) -> torch.Tensor:
        return prepared(x.shape[0])(x.float().contiguous())

    weakref.finalize(product, base.ggml_backend_buffer_free, buffer)
    return product


def _ggml(weight: torch.Tensor, format: str, repacked: bool = False) -> Product | None:
    if _ggml_libraries() is None:
        return None
    _, scale, minimum = unpack(weight, format)
    groups = scale.shape[1]
    raw = weight[:, : groups * FORMATS[format].code_bytes].unflatten(1, (groups, -1))
    numbers = [x.contiguous().view(torch.uint8).unflatten(1, (groups, 2)) for x in (scale, minimum) if x is not None]
    blocks = torch.cat((*numbers, raw), -1).contiguous()
    return _ggml_product(blocks, _GGML_TYPES[format], groups * GROUP, repacked)


def _ggml_q4_k(weight: torch.Tensor, format: str) -> Product | None:
    libraries = _ggml_libraries()
    if libraries is None or format != "int4":
        return None
    base, dense = libraries[0], dequantise(weight, format).float().contiguous()
    rows, columns = dense.shape
    if columns % base.ggml_blck_size(_GGML_Q4_K):
        return None
    blocks = torch.empty(rows, base.ggml_row_size(_GGML_Q4_K, columns), dtype=torch.uint8)
    base.ggml_quantize_chunk(_GGML_Q4_K, dense.data_ptr(), blocks.data_ptr(), 0, rows, columns, None)
    return _ggml_product(blocks, _GGML_Q4_K, columns, repacked=True)


LIBRARIES: dict[str, Library] = {
    "torch int8": _torch_int8,
    "torch int4": _torch_int4,
    "torch dynamic": _torch_dynamic,
    "onnxruntime": _onnxruntime,
    "ggml": _ggml,
    "ggml repacked": functools.partial(_ggml, repacked=True),
    "ggml Q4_K": _ggml_q4_k,
}


def absent() -> list[str]:
    """The libraries that are not installed, by the first words of the names above."""
    there = {name: find_spec(name) is not None for name in ("onnxruntime", "onnx", *_GGML_PLACES)}
    found = {"onnxruntime": there["onnxruntime"] and there["onnx"], "ggml": any(there[name] for name in _GGML_PLACES)}
    return [name for name, here in found.items() if not here]


def _linear(library: Library, sample: Sample) -> Callable[[], Any] | None:
    x, call = sample["x"], library(sample["weight"], sample.kwargs["format"])
    return None if call is None else lambda: call(x)


def _cats(library: Library, sample: Sample) -> Callable[[], Any] | None:
    x, format = sample["x"], sample.kwargs["format"]
    if not isinstance(format, str) or sample.args.get("down_scales") is not None or library is _torch_dynamic:
        return None
    gate, up = library(sample["w_gate"], format), library(sample["w_up"], format)
    if gate is None or up is None:
        return None
    down = library(quantise(dequantise(sample["w_down"], format).t().contiguous(), format), format)
    if down is None:  # ggml's blocks may divide the columns of the other two alone
        return None
    return lambda: down(F.silu(gate(x)) * up(x))


_BUILDERS = {"quantised_linear": _linear, "quantised_cats_mlp": _cats}
OPS = frozenset(_BUILDERS)


def peers(op: str, sample: Sample) -> dict[str, Callable[[], Any]]:
    """The calls of other libraries that stand for this sample on a CPU; {} for ops that have none."""
    builder = _BUILDERS.get(op)
    if builder is None or sample["x"].device.type != "cpu":
        return {}
    calls = {name: builder(library, sample) for name, library in LIBRARIES.items()}
    return {name: call for name, call in calls.items() if call is not None}


__all__ = ["LIBRARIES", "OPS", "absent", "peers"]
