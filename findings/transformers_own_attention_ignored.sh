#!/bin/sh
# transformers 5.24.0: of the attention function that one registers, some families do nothing, and some cannot be made with it.
# Expected: each layer calls the function, as in Llama and GPT-NeoX; or a model says that it cannot, as it does of an unknown name
#   (ValueError, with the names it takes) and in `set_attn_implementation`.
# Happens: BLOOM is made, gives the name in its config and never calls the function, without a warning. Falcon and GPT-Neo pass the
#   check of the name, and then look it up in a table of their own: KeyError.
# Seen:
#   transformers 5.24.0
#   Llama: config says mine, 2 calls in 2 layers
#   GPTNeoX: config says mine, 2 calls in 2 layers
#   Bloom: config says mine, 0 calls in 2 layers
#   Falcon: KeyError: 'mine'
#   GPTNeo: KeyError: 'mine'
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import torch
import transformers
from transformers import AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

calls = 0
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}


def mine(*args, **kwargs):
    global calls
    calls += 1
    return sdpa_attention_forward(*args, **kwargs)


def outcome(name):
    global calls
    calls = 0
    more = {"attention_types": [[["global"], 2]]} if name == "GPTNeo" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="mine").eval()
    except KeyError as error:
        return f"KeyError: {error}"
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    return f"config says {model.config._attn_implementation}, {calls} calls in 2 layers"


ALL_ATTENTION_FUNCTIONS.register("mine", mine)
AttentionMaskInterface.register("mine", sdpa_mask)
print(f"transformers {transformers.__version__}")
found = []
for name in ("Llama", "GPTNeoX", "Bloom", "Falcon", "GPTNeo"):
    found.append(outcome(name))
    print(f"{name}: {found[-1]}")
used, ignored = (f"config says mine, {count} calls in 2 layers" for count in (2, 0))
raise SystemExit(found != [used, used, ignored, "KeyError: 'mine'", "KeyError: 'mine'"])
PY
"$folder/venv/bin/python" "$folder/run.py"
