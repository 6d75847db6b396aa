# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Convert an RWKV-4 of transformers to a Stackformer with the same logits: a plain core, one ponder step.

python -m scripts.convert_rwkv --model_name_or_path RWKV/rwkv-4-169m-pile --output_dir outputs/rwkv-4-169m
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoConfig, RwkvConfig, RwkvForCausalLM

from experiments.command_line import DataclassParser, check_output_folder, run_main
from experiments.loading import load_saved, load_saved_tokenizer
from stackformer import StackformerConfig, StackformerForCausalLM

LAYER_NORM_EPS = 1e-5  # RWKV's last normalisation has this one, whatever the config says


@dataclass
class ConversionArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of an RwkvForCausalLM."})
    output_dir: str = field(metadata={"help": "Folder for the Stackformer."})
    tokenizer: bool = field(default=True, metadata={"help": "Whether to copy the tokenizer, too."})


def convert_config(config: RwkvConfig) -> StackformerConfig:
    """The Stackformer that computes what an RWKV-4 does.

    Raises:
        ValueError: for an `attention_hidden_size` of its own, or a `layer_norm_epsilon` that is not 1e-5.
    """
    if config.attention_hidden_size != config.hidden_size:
        raise ValueError(
            f"`attention_hidden_size` must be the hidden size {config.hidden_size}, got "
            f"{config.attention_hidden_size}"
        )
    if config.layer_norm_epsilon != LAYER_NORM_EPS:
        raise ValueError(f"`layer_norm_epsilon` must be {LAYER_NORM_EPS}, got {config.layer_norm_epsilon}")
    return StackformerConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        bottleneck_size=None,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=1,
        intermediate_size=config.intermediate_size,
        num_memory_banks=1,
        stack_depth=1,
        max_ponder_steps=1,
        mixer_types=["rwkv"] * config.num_hidden_layers,
        feed_forward_type="rwkv_channel_mix",
        norm_type="layer_norm",
        rms_norm_eps=LAYER_NORM_EPS,
        pad_token_id=None,  # RWKV-4 has none
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def convert_weights(weights: dict[str, Tensor], config: RwkvConfig) -> dict[str, Tensor]:
    """A Stackformer's weights from those of an RwkvForCausalLM, which must not be divided by `rescale_every`.

    The normalisation of the embeddings is folded into them, as in RWKV's own inference code, so that a tied
    output projection becomes a matrix of its own.
    """
    embeddings = weights["rwkv.embeddings.weight"]
    pre_norm = (weights[f"rwkv.blocks.0.pre_ln.{name}"].float() for name in ("weight", "bias"))
    normed = torch.nn.functional.layer_norm(
        embeddings.float(), [config.hidden_size], *pre_norm, LAYER_NORM_EPS
    )
    converted = {
        "lm_head.weight": weights["head.weight"].clone(),
        "model.embed_tokens.weight": normed.to(embeddings.dtype),
        "model.norm.weight": weights["rwkv.ln_out.weight"],
        "model.norm.bias": weights["rwkv.ln_out.bias"],
    }
    for number in range(config.num_hidden_layers):
        old, new = f"rwkv.blocks.{number}", f"model.layers.{number}"
        for source, target in (
            ("ln1.weight", "input_layernorm.weight"),
            ("ln1.bias", "input_layernorm.bias"),
            ("ln2.weight", "post_attention_layernorm.weight"),
            ("ln2.bias", "post_attention_layernorm.bias"),
            ("attention.time_decay", "mixer.time_decay"),
            ("attention.time_first", "mixer.time_first"),
            ("attention.key.weight", "mixer.k_proj.weight"),
            ("attention.value.weight", "mixer.v_proj.weight"),
            ("attention.receptance.weight", "mixer.receptance_proj.weight"),
            ("attention.output.weight", "mixer.o_proj.weight"),
            ("feed_forward.key.weight", "mlp.up_proj.weight"),
            ("feed_forward.receptance.weight", "mlp.receptance_proj.weight"),
            ("feed_forward.value.weight", "mlp.down_proj.weight"),
        ):
            converted[f"{new}.{target}"] = weights[f"{old}.{source}"]
        for source, target, names in (
            ("attention", "mixer", ("key", "value", "receptance")),
            ("feed_forward", "mlp", ("key", "receptance")),
        ):
            mixtures = [weights[f"{old}.{source}.time_mix_{name}"].flatten() for name in names]
            converted[f"{new}.{target}.shift.weight"] = torch.stack(mixtures)
    return converted


@torch.no_grad()
def main(argv: list[str] | None = None) -> StackformerForCausalLM:
    """Convert as `argv` says (default: the command line), save, and return the model."""
    (args,) = DataclassParser(
        ConversionArguments, description=__doc__.split("\n")[0]
    ).parse_args_into_dataclasses(argv)
    check_output_folder("output_dir", args.output_dir)
    config = load_saved(AutoConfig.from_pretrained, "model_name_or_path", args.model_name_or_path, "model")
    if not isinstance(config, RwkvConfig):
        raise ValueError(
            f"model_name_or_path={args.model_name_or_path}: expected an RWKV-4, got {config.model_type}."
        )
    # Not called, it has not divided its weights by `rescale_every` yet.
    source = load_saved(
        RwkvForCausalLM.from_pretrained, "model_name_or_path", args.model_name_or_path, "model"
    )
    tokenizer = None
    if args.tokenizer:
        tokenizer = load_saved_tokenizer("model_name_or_path", args.model_name_or_path)
    model = StackformerForCausalLM(convert_config(config))
    # Assigned, they keep their dtypes: that of the decays is float32 in any model.
    model.load_state_dict(convert_weights(source.state_dict(), config), assign=True)
    model.save_pretrained(args.output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters():,} parameters")
    return model.eval()


__all__ = ["ConversionArguments", "convert_config", "convert_weights", "main"]


if __name__ == "__main__":
    run_main(main)
