#!/bin/sh
# transformers 5.24.0: prompt lookup goes wrong in the second turn of a chat that goes on with the first turn's cache.
# Expected: greedy text is the same with `prompt_lookup_num_tokens` and without, and the cache holds as many tokens.
# Happens: the first turn agrees; in the second the cache is longer than the text, and the tokens differ.
# Seen (softmax attention, random weights):
#   plain : turn 2 [11, 17, 2], cache 52 of 53 tokens
#   lookup: turn 2 [12, 17, 2], cache 93 of 53 tokens
# For our users: pass a fresh cache to every call of `generate` that looks up its prompt.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, initializer_range=0.3
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(3, 50, (1, 8)).repeat(1, 4)
fixed = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def chat(**options):
    cache = DynamicCache(config=config)
    first = model.generate(prompt, cache=cache, **fixed, **options)
    so_far = torch.cat([first, prompt[:, :8]], 1)
    second = model.generate(so_far, cache=cache, **fixed, **options)
    return first.tolist(), second[0, so_far.shape[1] :].tolist(), cache.get_seq_length(), second.shape[1]


print(f"transformers {transformers.__version__}")
plain, lookup = chat(), chat(prompt_lookup_num_tokens=3)
for name, (_, tokens, held, length) in (("plain ", plain), ("lookup", lookup)):
    print(f"{name}: turn 2 {tokens}, cache {held} of {length} tokens")
as_seen = plain[0] == lookup[0] and plain[1] != lookup[1] and plain[2] == plain[3] - 1 and lookup[2] > lookup[3]
raise SystemExit(not as_seen)
PY
"$folder/venv/bin/python" "$folder/run.py"
