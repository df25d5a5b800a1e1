"""The geometry that tests train: seconds of a run, and every kind of layer."""

TINY_MODEL = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 128
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
kv_latent_dim = 16
rope_dim = 8
sliding_window = 16
"""
