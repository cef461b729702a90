#!/bin/sh
# transformers 5.24.0: eager attention in float64 gives NaN for a row that is padded on the left, at its real tokens too.
# Expected: finite logits, those of sdpa, as in float32.
# Happens: masked scores get the least float64, and the softmax is computed in float32, where that is minus infinity: a place of
#   padding, which sees nothing, becomes NaN. In the next layer it is a value with weight zero, and zero times NaN is NaN.
# Seen:
#   transformers 5.24.0
#   Llama: float32 eager finite, float32 sdpa finite, float64 eager NaN, float64 sdpa finite
#   Qwen2: float32 eager finite, float32 sdpa finite, float64 eager NaN, float64 sdpa finite
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50, "pad_token_id": 0,
}


def real_tokens(model, dtype, implementation):
    model = model.eval().to(dtype)
    model.set_attn_implementation(implementation)
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        return "NaN" if model(ids, attention_mask=mask).logits[0, 6:].isnan().any() else "finite"


print(f"transformers {transformers.__version__}")
right = True
for name, kind, config in (("Llama", LlamaForCausalLM, LlamaConfig), ("Qwen2", Qwen2ForCausalLM, Qwen2Config)):
    torch.manual_seed(0)
    model, found = kind(config(**SIZES)), []
    for dtype in (torch.float32, torch.float64):
        for implementation in ("eager", "sdpa"):
            found.append(real_tokens(model, dtype, implementation))
    cases = ("float32 eager", "float32 sdpa", "float64 eager", "float64 sdpa")
    print(f"{name}: " + ", ".join(" ".join(pair) for pair in zip(cases, found)))
    right &= found == ["finite", "finite", "NaN", "finite"]
raise SystemExit(not right)
PY
"$folder/venv/bin/python" "$folder/run.py"
