#!/bin/sh
# transformers 5.24.0: GPT-OSS does not keep sequences apart that are packed into one row by their positions.
# Expected: as in Llama, positions that start again begin a sequence, and the second one's logits are those that it has alone.
# Happens: the model does not give the positions to what makes its masks, so that the second sequence sees the first.
# Seen:
#   transformers 5.24.0
#   Llama: the second sequence as alone
#   GptOss: the second sequence sees the first
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import torch
import transformers
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50, "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 16}


def apart(model):
    model = model.eval()
    model.set_attn_implementation("eager")
    ids = torch.arange(1, 13)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, 5:]
        alone = model(ids[:, 5:], use_cache=False).logits
    return bool((packed - alone).abs().max() < 1e-5 * alone.abs().max())


torch.manual_seed(0)
llama = apart(LlamaForCausalLM(LlamaConfig(**SIZES)))
gpt = apart(GptOssForCausalLM(GptOssConfig(**SIZES, **EXPERTS)))
print(f"transformers {transformers.__version__}")
for name, right in (("Llama", llama), ("GptOss", gpt)):
    print(f"{name}: the second sequence {'as alone' if right else 'sees the first'}")
raise SystemExit((llama, gpt) != (True, False))
PY
"$folder/venv/bin/python" "$folder/run.py"
