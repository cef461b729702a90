"""The models of the zoo: decoders, encoders, encoder-decoders, vision, and what is refused."""

from __future__ import annotations

from typing import Any

from .entry import IMAGE, IMAGE_TOKEN, VOCABULARY, Entry

ALL = ("generation", "static cache", "beams")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENCODER: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
SEQUENCE: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "init_std": 0.2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": IMAGE,
    "patch_size": 4, "initializer_range": 0.2,
}  # fmt: skip


def mixed(*windows: int | None) -> dict[str, Any]:
    """Layers with a window, or None: without."""
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next(window for window in windows if window is not None)
    return {"num_hidden_layers": len(windows), "layer_types": kinds, "sliding_window": window}


def decoder(family: str, name: str, attention: str, more: dict[str, Any] | None = None, **options: Any) -> Entry:
    """Of a class <family>ForCausalLM."""
    config, model = options.pop("config", f"{family}Config"), options.pop("model", f"{family}ForCausalLM")
    return Entry(
        name, model, config, SIZES | (more or {}), "decoder", attention,
        **({"generations": ALL} | options),
    )  # fmt: skip


GROUPED = "causal, grouped heads"
DECODERS = (
    decoder("Gemma2", "Gemma 2", "sliding and full, capped scores", mixed(4, None) | {"attn_logit_softcapping": 2.0}),
    decoder("VaultGemma", "VaultGemma", "sliding and full, capped scores", mixed(4, None) | {"attn_logit_softcapping": 2.0}),
    decoder("Gemma3", "Gemma 3 (text)", "sliding and full, q and k normalised", mixed(4, None), config="Gemma3TextConfig"),
    decoder(
        "Gemma4", "Gemma 4 (text)", "sliding with heads of 8, full with heads of 512",
        mixed(4, None) | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 512},
        config="Gemma4TextConfig",
    ),
    decoder("Gemma", "Gemma", GROUPED),
    decoder("GptOss", "gpt-oss", "sliding and full, sinks, experts", mixed(4, None) | EXPERTS),
    decoder("Llama", "Llama", GROUPED),
    decoder(
        "Llama4", "Llama 4 (text)", "chunks of 8 and full, experts",
        {
            "attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 40, "num_local_experts": 2, "moe_layers": [1],
        },
        config="Llama4TextConfig",
    ),
    decoder("Qwen2", "Qwen2", "full and sliding", mixed(None, 4) | {"use_sliding_window": True}),
    decoder("Qwen3", "Qwen3", "causal, grouped heads, q and k normalised"),
    decoder("Qwen2Moe", "Qwen2-MoE", "causal, grouped heads, experts", EXPERTS | {"shared_expert_intermediate_size": 16}),
    decoder("Qwen3Moe", "Qwen3-MoE", "causal, grouped heads, experts", EXPERTS),
    decoder("Mistral", "Mistral", "sliding", {"sliding_window": 4}),
    decoder("Mixtral", "Mixtral", "sliding, experts", {"sliding_window": 4} | EXPERTS),
    decoder("Ministral", "Ministral", "sliding and full", mixed(4, None)),
    decoder("Phi", "Phi", "causal"),
    decoder("Phi3", "Phi-3", "sliding, one projection for q, k and v", {"sliding_window": 4}),
    decoder("Olmo", "OLMo", GROUPED),
    decoder("Olmo2", "OLMo 2", "causal, grouped heads, q and k normalised"),
    decoder("Olmo3", "OLMo 3", "sliding and full", mixed(4, None)),
    decoder("Olmoe", "OLMoE", "causal, grouped heads, experts", EXPERTS),
    decoder("SmolLM3", "SmolLM3", "causal, one layer without positions", {"no_rope_layers": [1, 0]}),
    decoder("Granite", "Granite", "causal, a scale of its own", {"attention_multiplier": 0.2}),
    decoder("Cohere", "Cohere", GROUPED),
    decoder("Cohere2", "Cohere 2", "sliding and full", mixed(4, None)),
    decoder("Glm", "GLM", GROUPED),
    decoder("Glm4", "GLM-4", GROUPED),
    decoder("Starcoder2", "Starcoder2", "sliding", {"sliding_window": 4}),
    decoder("Arcee", "Arcee", GROUPED),
    decoder("Apertus", "Apertus", "causal, q and k normalised"),
    decoder("BitNet", "BitNet", GROUPED),
    decoder("Ernie4_5", "ERNIE 4.5", GROUPED),
    decoder("Exaone4", "EXAONE 4", "sliding and full", mixed(4, None)),
    decoder("Helium", "Helium", GROUPED),
    decoder("HunYuanDenseV1", "HunYuan", GROUPED),
    decoder("Nemotron", "Nemotron", GROUPED),
    decoder("Persimmon", "Persimmon", "causal"),
    decoder("SeedOss", "Seed-OSS", GROUPED),
    decoder("StableLm", "StableLM", GROUPED),
    decoder(
        "DeepseekV3", "DeepSeek-V3", "latent: keys of 16, values of 8",
        EXPERTS | {
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    decoder(
        "GPT2", "GPT-2", "causal", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, model="GPT2LMHeadModel"
    ),
    decoder("GPTNeoX", "GPT-NeoX", "causal"),
    decoder("OPT", "OPT", "causal", {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    decoder("BioGpt", "BioGPT", "causal"),
)  # fmt: skip


def encoder(
    family: str, name: str, attention: str = "both ways", more: dict[str, Any] | None = None, **options: Any
) -> Entry:
    """Of a class <family>Model."""
    return Entry(name, f"{family}Model", f"{family}Config", ENCODER | (more or {}), "encoder", attention, **options)


ENCODERS = (
    encoder("Bert", "BERT"),
    encoder("Roberta", "RoBERTa"),
    encoder("XLMRoberta", "XLM-RoBERTa"),
    encoder("Electra", "ELECTRA", more={"embedding_size": 32}),
    encoder("Albert", "ALBERT", more={"embedding_size": 32}),
    encoder("DistilBert", "DistilBERT", more={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}),
    encoder(
        "ModernBert", "ModernBERT", "both ways, full and within 4 to each side",
        {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    encoder("NomicBert", "Nomic BERT"),
    encoder("EuroBert", "EuroBERT"),
    encoder("Esm", "ESM", more={"position_embedding_type": "rotary"}),
    encoder("CLIPText", "CLIP (text)", "causal", {"projection_dim": 16}),
    encoder("SiglipText", "SigLIP (text)"),
)  # fmt: skip


def sequence(model: str, config: str, name: str, more: dict[str, Any] | None = None, **options: Any) -> Entry:
    return Entry(
        name, model, config, SEQUENCE | (more or {}), options.pop("kind", "encoder-decoder"), "both ways, causal, cross",
        **({"generations": ALL} | options),
    )  # fmt: skip


SEQUENCES = (
    sequence("BartForConditionalGeneration", "BartConfig", "BART"),
    sequence("MBartForConditionalGeneration", "MBartConfig", "mBART"),
    sequence("PegasusForConditionalGeneration", "PegasusConfig", "Pegasus"),
    sequence("MarianMTModel", "MarianConfig", "Marian"),
    sequence("M2M100ForConditionalGeneration", "M2M100Config", "M2M-100"),
    sequence(
        "WhisperForConditionalGeneration", "WhisperConfig", "Whisper",
        {
            "num_mel_bins": 4, "max_source_positions": 12, "max_target_positions": 32, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        kind="speech", sides=(),
    ),
)  # fmt: skip


def vision(family: str, name: str, more: dict[str, Any] | None = None, **options: Any) -> Entry:
    """Of a class <family>Model."""
    config = options.pop("config", f"{family}Config")
    return Entry(name, f"{family}Model", config, VISION | (more or {}), "image", "both ways", sides=(), **options)


IMAGES = (
    vision("ViT", "ViT"),
    vision("DeiT", "DeiT"),
    vision("Dinov2", "DINOv2", {"mlp_ratio": 2}),
    vision("Dinov2WithRegisters", "DINOv2 with registers", {"mlp_ratio": 2}),
    vision("DINOv3ViT", "DINOv3"),
    vision("ViTMSN", "ViT-MSN"),
    vision("Yolos", "YOLOS", {"image_size": [IMAGE, IMAGE]}),
    vision("CLIPVision", "CLIP (vision)", {"projection_dim": 16}),
    vision("SiglipVision", "SigLIP (vision)"),
    vision("IJepa", "I-JEPA"),
    Entry(
        "CLIP", "CLIPModel", "CLIPConfig",
        {
            "text_config": ENCODER | {"projection_dim": 16}, "vision_config": VISION | {"projection_dim": 16},
            "projection_dim": 16,
        },
        "image and text", "causal and both ways", sides=("right",), notes="results of the last token, so no padding there",
    ),
)  # fmt: skip

SIGHT = VISION | {"patch_size": 8, "model_type": "siglip_vision_model", "vision_use_head": False}
ILLUSTRATED = (
    Entry(
        "PaliGemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {
            "text_config": SIZES | {"model_type": "gemma", "num_image_tokens": 4},
            "vision_config": SIGHT | {"projection_dim": 32},
            "projection_dim": 32, "image_token_index": IMAGE_TOKEN, "hidden_size": 32, **SPECIAL,
        },
        "prefix", "a prefix seen both ways, then causal", generations=ALL,
    ),
    Entry(
        "Gemma 3", "Gemma3ForConditionalGeneration", "Gemma3Config",
        {
            "text_config": SIZES | mixed(3, None) | {"model_type": "gemma3_text"}, "vision_config": SIGHT,
            "mm_tokens_per_image": 4, "image_token_index": IMAGE_TOKEN, "boi_token_index": 5, "eoi_token_index": 6, **SPECIAL,
        },
        "image in text", "blocks of image tokens; in sliding layers cut by the window", generations=ALL,
    ),
)  # fmt: skip

REFUSED = (
    Entry(
        "T5", "T5ForConditionalGeneration", "T5Config",
        SPECIAL | {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        "encoder-decoder", "a learned bias for every pair", refused="^position_bias: ",
    ),
    Entry(
        "BLOOM", "BloomForCausalLM", "BloomConfig",
        SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "decoder", "ALiBi, computed in the model itself", refused="^attention_mask: this model",
    ),
    Entry(
        "MPT", "MptForCausalLM", "MptConfig",
        SPECIAL | {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "decoder", "ALiBi, computed in the model itself", refused="^attention_mask: this model",
    ),
)  # fmt: skip
ENTRIES = (*DECODERS, *ENCODERS, *SEQUENCES, *IMAGES, *ILLUSTRATED, *REFUSED)
