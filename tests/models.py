"""Small models for tests, with weights spread so far that a lost state or an unmasked token shows."""

import torch

from stackformer import StackformerConfig, StackformerForCausalLM

# One model of each shape the class can take.
SHAPES = {
    "plain core": {"bottleneck_size": None, "num_memory_banks": 1, "stack_depth": 1, "max_ponder_steps": 1},
    "one step": {"num_memory_banks": 3, "stack_depth": 1, "max_ponder_steps": 1},
    "fixed depth": {"num_memory_banks": 1, "stack_depth": 2, "max_ponder_steps": 3, "halting_threshold": 0.0},
    "halting stack": {
        "num_memory_banks": 2,
        "stack_depth": 3,
        "max_ponder_steps": 4,
        "halting_threshold": 0.4,
    },
    "attention": {
        "bottleneck_size": None,
        "stack_depth": 1,
        "max_ponder_steps": 1,
        "mixer_types": ["attention"] * 2,
    },
    "hybrid stack": {"mixer_types": ["banked_linear_attention", "attention"], "halting_threshold": 0.2},
    "coupled": {"mixer_types": ["coupled", "banked_linear_attention"], "halting_threshold": 0.2},
    "coupled angles": {
        "mixer_types": ["coupled_angles", "banked_linear_attention"],
        "halting_threshold": 0.2,
    },
    "feedback": {"feedback": True, "stack_depth": 2, "max_ponder_steps": 3, "halting_threshold": 0.2},
    "rwkv": {
        "bottleneck_size": None,
        "stack_depth": 1,
        "max_ponder_steps": 1,
        "mixer_types": ["rwkv"] * 2,
        "feed_forward_type": "rwkv_channel_mix",
        "norm_type": "layer_norm",
    },
    "rwkv stack": {
        "mixer_types": ["rwkv", "banked_linear_attention"],
        "feed_forward_type": "rwkv_channel_mix",
        "halting_threshold": 0.3,
    },
    "sliding window": {
        "mixer_types": ["attention", "banked_linear_attention"],
        "sliding_window": 4,
        "halting_threshold": 0.2,
    },
    "delta rule": {
        "mixer_types": ["banked_delta_rule", "banked_linear_attention"],
        "stack_depth": 1,
        "max_ponder_steps": 2,
        "halting_threshold": 0.3,
    },
    "inner loop": {
        "mixer_types": ["banked_linear_attention", "fast_weights"],
        "fast_weights_steps": 2,
        "halting_threshold": 0.2,
    },
    "fixed-size attention": {
        "mixer_types": ["fixed_size_attention", "banked_linear_attention"],
        "fast_weights_decay": 0.9,
        "fast_weights_rate": 1.0,
        "halting_threshold": 0.3,
    },
    "neural memory": {
        "mixer_types": ["neural_memory", "attention"],
        "sliding_window": 4,
        "num_persistent_tokens": 2,
        "memory_chunk_size": 4,
    },
    "memory as gate": {
        "bottleneck_size": None,
        "stack_depth": 1,
        "max_ponder_steps": 1,
        "mixer_types": ["memory_as_gate"] * 2,
        "sliding_window": 4,
        "memory_chunk_size": 8,
    },
    "memory as context": {
        "bottleneck_size": None,
        "stack_depth": 1,
        "max_ponder_steps": 1,
        "mixer_types": ["memory_as_context"] * 2,
        "num_persistent_tokens": 2,
        "memory_chunk_size": 5,
    },
    "infinity-former": {
        "bottleneck_size": None,
        "stack_depth": 1,
        "max_ponder_steps": 1,
        "mixer_types": ["continuous_attention"] * 2,
        "sliding_window": 7,
        "memory_block": 5,
        "num_basis_functions": 8,
    },
    "sticky memories on a stack": {
        "mixer_types": ["continuous_attention", "banked_linear_attention"],
        "sliding_window": 3,
        "memory_block": 3,
        "num_basis_functions": 6,
        "basis_widths": [0.2, 0.5],
        "sticky_memories": True,
        "halting_threshold": 0.2,
    },
}


def tiny_config(**overrides) -> StackformerConfig:
    fields = {
        "hidden_size": 24,
        "bottleneck_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "chunk_size": 8,
        "max_decay_rate": 0.5,
        "initializer_range": 0.2,
        **SHAPES["halting stack"],
    }
    fields |= overrides
    fields.setdefault("mixer_types", ["banked_linear_attention"] * fields["num_hidden_layers"])
    return StackformerConfig(**fields)


def spread_weights(model: torch.nn.Module, noise: float = 0.2, seed: int = 0) -> torch.nn.Module:
    """Noise on every parameter, so that no gate, bias or padding row stays at a value that hides a
    mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("action_proj.bias"):
                parameter.copy_(torch.tensor([0.0, 0.0, 1.0]))  # tokens finish after one to four steps
    return model


def tiny_model(dtype: torch.dtype = torch.float64, noise: float = 0.2, **overrides) -> StackformerForCausalLM:
    """In float64, where equal means equal to 1e-9; in evaluation mode."""
    torch.manual_seed(0)
    return spread_weights(StackformerForCausalLM(tiny_config(**overrides)), noise).to(dtype).eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
