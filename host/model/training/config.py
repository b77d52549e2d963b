"""The demo model's configuration: the real checkpoint's keys, small numbers."""
CONFIG = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 1344, "rms_norm_eps": 1e-5,
    "initializer_range": 0.02, "max_position_embeddings": 8192, "original_max_position_embeddings": 4096, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32},
    "sliding_window": 262144, "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float16", "transformers_version": "4.38.1",
    "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True, "with_learnable_separator": True},
    "img_processor": {"name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336", "image_dim_out": 192, "num_img_tokens": 144,
                      "hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_hidden_layers": 7},
}
