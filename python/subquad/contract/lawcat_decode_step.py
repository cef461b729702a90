"""Contract of LAWCAT's decoding step."""

from __future__ import annotations

from ._contract import Contract, Operator

MAX_DIM, MAX_TAPS = 256, 8

CONTRACT = Contract(
    {
        "lawcat_decode_step_": Operator(
            "(Tensor q0, Tensor k0, Tensor v, Tensor? u, Tensor cq, Tensor ck, Tensor? cq_bias, Tensor? ck_bias, "
            "Tensor wphi, Tensor wphi_k, Tensor(a!) conv_q, Tensor(b!) conv_k, Tensor(c!) state, Tensor(d!)? z, "
            "Tensor? state_indices, bool silu, float tau, float clamp_min, float scale, float eps, float fm_eps) -> Tensor",
            lambda q0, k0, v, *_: q0.new_empty((*q0.shape[:2], v.shape[2])),
            outputs=("o",),
        )
    },
    cuda=("native", "triton", "reference"),
    family="lawcat",
)
