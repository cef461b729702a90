#!/bin/sh
# transformers 5.24.0: a model whose tied weights are buffers is tied and saved, and cannot be loaded.
# Expected: from_pretrained gives back what save_pretrained wrote. Tying takes buffers: the model is made, tied and saved with them, as
#   layers with integer weights would be.
# Happens: from_pretrained raises AttributeError: before weights are tied, each tied name is looked up among the parameters alone.
#   With a parameter in the place of the buffer the same model loads.
# Seen:
#   transformers 5.24.0
#   parameter: tied True, saved 2 tensors, loaded equal True
#   buffer: tied True, saved 2 tensors, AttributeError
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cat > "$folder/run.py" <<'PY'
import os
import sys
import tempfile

import safetensors
import torch
import transformers

transformers.logging.set_verbosity_error()


class Codes(torch.nn.Module):
    def __init__(self, buffer):
        super().__init__()
        if buffer:
            self.register_buffer("weight", torch.zeros(4, 3, dtype=torch.uint8))
        else:
            self.weight = torch.nn.Parameter(torch.zeros(4, 3))


class Model(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig
    _tied_weights_keys = {"head.weight": "table.weight"}
    buffer = False

    def __init__(self, config):
        super().__init__(config)
        self.table, self.head = Codes(self.buffer), Codes(self.buffer)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()


class Buffers(Model):
    buffer = True


found = []
print(f"transformers {transformers.__version__}")
for name, kind in (("parameter", Model), ("buffer", Buffers)):
    model = kind(transformers.PretrainedConfig(tie_word_embeddings=True))
    model.table.weight.data.fill_(7)
    tied = model.head.weight is model.table.weight
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safetensors.safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
            saved = len(list(file.keys()))
        try:
            again = kind.from_pretrained(folder)
            outcome = f"loaded equal {torch.equal(again.head.weight, model.head.weight)}"
        except AttributeError as error:
            outcome = type(error).__name__
    found.append((tied, saved, outcome))
    print(f"{name}: tied {tied}, saved {saved} tensors, {outcome}")
sys.exit(found != [(True, 2, "loaded equal True"), (True, 2, "AttributeError")])
PY
"$folder/venv/bin/python" "$folder/run.py"
