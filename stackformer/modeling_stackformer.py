# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The Stackformer model: a recurrent core in a bottleneck, applied again and again under a processing stack.

- embeddings (D) are large, the recurrent core (d) is small: a projection before it, a feed-forward after it
- core layers mix tokens through a bank of linear-attention memories: the state does not grow
- every ponder step moves probability on a differentiable stack; what falls off its bottom is the output
- tokens that are padding, or done, are gathered out: they take no time and leave no trace

Letters: B batch, T time, D hidden size, d core width, n active tokens, S stack levels, P ponder steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from transformers import initialization as init
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput, can_return_tuple, logging

from .adapters import adapters_by_token, mixed_batch_hooks
from .cache_stackformer import (
    StackformerCache,
    StackformerCacheLayer,
    StackformerStaticCacheLayer,
    check_cache,
)
from .configuration_stackformer import SPECIAL_TOKENS, StackformerConfig
from .dtypes import at_least_float32
from .generation_stackformer import StackformerGenerationMixin
from .identity import Mark, active_adapters, new_number, sample_digest
from .layers_stackformer import NORMS, GatedMLP, ResidualProjection, ShortConvolution, SliceProjection
from .mixer import Mixer
from .mixer_attention import Attention
from .mixer_banked_linear_attention import BankedLinearAttention
from .mixer_continuous import ContinuousAttention
from .mixer_coupled import Coupled
from .mixer_delta_rule import DeltaRule
from .mixer_neural_memory import MemoryAsContext, MemoryAsGate, MemoryAsLayer, NeuralMemory
from .mixer_rwkv import ChannelMix, TimeMix, TokenShift
from .model_inputs import (
    check_depths,
    check_num_items,
    check_padding_mask,
    label_each_token,
    packed_documents,
)
from .processing_stack import (
    POP,
    Stack,
    divergence_from_geometric,
    expected_steps,
    flush_stack,
    init_stack,
    read_stack,
    step_stack,
)
from .stack_trace import TextTrace
from .state import State, StateSpec
from .token_layout import TokenLayout
from .versions import CACHE_NAME, CacheNames, check_keywords, either_cache

logger = logging.get_logger(__name__)

# The token mixers by their name in `config.mixer_types`.
MIXERS: dict[str, Callable[[StackformerConfig], Mixer]] = {
    "attention": Attention,
    "banked_linear_attention": BankedLinearAttention,
    "continuous_attention": ContinuousAttention,
    "coupled": Coupled,
    "delta_rule": DeltaRule,
    "memory_as_context": MemoryAsContext,
    "memory_as_gate": MemoryAsGate,
    "neural_memory": MemoryAsLayer,
    "rwkv": TimeMix,
}

# Where a saved model's code finds the class of each auto class.
AUTO_MAP = {
    "AutoConfig": "configuration_stackformer.StackformerConfig",
    "AutoModel": "modeling_stackformer.StackformerModel",
    "AutoModelForCausalLM": "modeling_stackformer.StackformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_stackformer.StackformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_stackformer.StackformerForTokenClassification",
}

# `DynamicCache(config=...)` and `StaticCache(config=...)` build the right layers, too.
DYNAMIC_LAYER_TYPE_MAPPING["stackformer"] = StackformerCacheLayer
STATIC_LAYER_TYPE_MAPPING["stackformer"] = StackformerStaticCacheLayer

# The Trainer's label smoothing shifts labels for the models in this list only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["stackformer"] = "StackformerForCausalLM"


@dataclass
class StackTrace(ModelOutput):
    """What every token did at every ponder step; zeros where it was not active.

    Args:
        active (`torch.BoolTensor` [B, T, P]): whether the token was computed.
        pointer (`torch.FloatTensor` [B, T, P, S]): probability mass on each stack level, before the step.
        actions (`torch.FloatTensor` [B, T, P, 3]): probabilities of push, no-op and pop. At the last
            step, and where the rest of the mass was flushed, all that is left is dropped, whatever the
            actions say.
        bank_reads, bank_writes (`torch.FloatTensor` [B, T, P, L, H, N]): softmax over the memory banks.
            Zeros for core layers without any; these fields are `None` if no layer has them.
        bank_decays (`torch.FloatTensor` [B, T, P, L, H, N]): logarithm of what each bank keeps where all of
            the pointer's mass is; elsewhere the logarithm is times the mass there. At most 0.
    """

    active: Tensor | None = None
    pointer: Tensor | None = None
    actions: Tensor | None = None
    bank_reads: Tensor | None = None
    bank_writes: Tensor | None = None
    bank_decays: Tensor | None = None


@dataclass
class StackformerModelOutputWithPast(CacheNames, BaseModelOutputWithPast):
    """Base class for the model's outputs.

    Args:
        last_hidden_state (`torch.FloatTensor` [B, T, D]): the accumulated output of the stack, normalised.
        cache ([`StackformerCache`]): the recurrent state after the last token, also as `past_key_values`.
        hidden_states (`tuple(torch.FloatTensor)`): with `output_hidden_states=True`, P + 1 tensors [B, T, D]:
            the embeddings, and what each token was thinking after each ponder step.
        ponder_steps (`torch.FloatTensor` [B, T]): expected number of ponder steps of each token, 0 for
            padding. Gradients flow through it.
        ponder_distribution (`torch.FloatTensor` [B, T, P]): the mass that each token dropped at each ponder
            step, which is its distribution over halting steps; zeros for padding. Gradients flow through it.
        stack_trace ([`StackTrace`]): with `output_stack_trace=True`; `None` where all is padding.
    """

    ponder_steps: Tensor | None = None
    ponder_distribution: Tensor | None = None
    stack_trace: StackTrace | None = None


@dataclass
class StackformerCausalLMOutputWithPast(CacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with `ponder_steps`, `ponder_distribution` and `stack_trace`, see
    [`StackformerModelOutputWithPast`]."""

    ponder_steps: Tensor | None = None
    ponder_distribution: Tensor | None = None
    stack_trace: StackTrace | None = None


class StackformerCoreLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer of the core: a mixer along time, a feed-forward along channels."""

    def __init__(self, config: StackformerConfig, layer_idx: int):
        super().__init__()
        size = config.core_size
        norm = NORMS[config.norm_type]
        self.input_layernorm = norm(size, eps=config.rms_norm_eps)
        mixer_type = config.mixer_types[layer_idx]
        if mixer_type not in MIXERS:
            raise ValueError(f"`mixer_types` must be names out of {list(MIXERS)}, got {mixer_type!r}")
        self.mixer = MIXERS[mixer_type](config)
        self.state_spec: StateSpec = self.mixer.state_spec()
        self.post_attention_layernorm = norm(size, eps=config.rms_norm_eps)
        # RWKV's feed-forward has a past: it is the last tensor of the layer's state.
        self.mlp_has_past = config.feed_forward_type == "rwkv_channel_mix"
        if self.mlp_has_past:
            channel_mix = ChannelMix(config)
            self.mlp: nn.Module = channel_mix
            self.state_spec += channel_mix.state_spec()
        else:
            self.mlp = GatedMLP(size, config.intermediate_size, size, config.hidden_act)

    def forward(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, *state: Tensor | Callable[..., State]
    ) -> tuple[Any, ...]:
        """Active tokens [n, d] to active tokens [n, d], the mixer's bank weights, and the tensors of the
        layer's state.

        A state is spread over the arguments, and the results, so that reentrant checkpointing sees its
        tensors. There are none at the beginning. A cache that has to know what is read before it can say
        what the state was (long_context.py, sequence_parallel.py) hands over a function instead, which also
        returns what the mixer need not compute again.
        """
        normed, fed_past = self.input_layernorm(hidden), None
        past: Any = state or None
        known: Any = ()
        if past is not None and callable(past[0]):
            past, *known = past[0](self.mixer, normed, pointer, layout)
        if self.mlp_has_past and past is not None:
            past, fed_past = past[:-1], past[-1]
        mixed, new_state, bank_weights = self.mixer(normed, pointer, layout, past, *known)
        hidden = hidden + mixed
        normed = self.post_attention_layernorm(hidden)
        if not self.mlp_has_past:
            return hidden + self.mlp(normed), bank_weights, *new_state
        fed, fed_past = self.mlp(normed, layout, fed_past)
        return hidden + fed, bank_weights, *new_state, fed_past

    def advance(self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: State | None) -> State:
        """Only the layer's new state: for rolling back."""
        if self.mlp_has_past:
            return self.forward(hidden, pointer, layout, *(state or ()))[2:]
        return self.mixer(self.input_layernorm(hidden), pointer, layout, state)[1]


class StackformerBottleneck(nn.Module):
    """What the core thought [n, d] joins the embedding [n, D] that it was thinking about."""

    def __init__(self, config: StackformerConfig):
        super().__init__()
        joint_size = config.core_size + config.hidden_size
        self.up_proj = SliceProjection(config.core_size, config.hidden_size)
        self.mlp_norm = NORMS[config.norm_type](joint_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(
            joint_size, config.bottleneck_intermediate_size, config.hidden_size, config.hidden_act
        )
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, core: Tensor, embedding: Tensor) -> Tensor:
        joint = self.mlp_norm(torch.cat([core, embedding], dim=-1))
        return self.norm(embedding + self.up_proj(core) + self.mlp(joint))


class StepGate(nn.Module):
    """How far a ponder step after the first moves each channel towards the new thought [n, D].

    The core is the same at every step. Where later steps start small, a deep model first learns what a single
    step learns, and depth joins in as it is of use (docs/experiments.md).
    """

    INITIAL = 0.1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        return old + self.weight * (new - old)


class ActionProjection(nn.Linear):
    """Logits of push, no-op and pop [n, 3] from thoughts [n, D].

    It starts at full depth and the same for every token, and learns slowly: where it did not, every token
    learned within a hundred steps to return at once, before depth could be of use (docs/experiments.md).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 3)

    def initial_bias(self) -> Tensor:
        """A pop starts unlikely."""
        bias = torch.zeros(3)
        bias[POP] = -3
        return bias


class StackformerPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the library has to know about the architecture."""

    config: StackformerConfig
    config_class = StackformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StackformerCoreLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _can_compile_fullgraph = True
    # What the softmax attention of a configuration may run on.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StackformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if "rwkv" in config.mixer_types:  # rounded, small decays could not be told from none
            self._keep_in_fp32_modules_strict = {"time_decay", "time_first"}
        # A list for each model: transformers adds to it in place.
        self.model_tags = ["stackformer"]

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers; the code is saved, too, and every auto class is told where it is."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; special tokens that are cut off are None in the configurations."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        size = embeddings.num_embeddings
        for config in filter(None, (self.config, getattr(self, "generation_config", None))):
            for name in SPECIAL_TOKENS:
                value = getattr(config, name, None)
                kept = [x for x in value if x < size] if isinstance(value, (list, tuple)) else value
                if kept == [] or (isinstance(kept, int) and kept >= size):
                    logger.warning_once(
                        f"`{name}` {value} is not among the {size} tokens any more: it is None"
                    )
                    kept = None
                setattr(config, name, kept)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls it for modules that hold parameters of their own.

        | what                 | initial value                                                      |
        |----------------------|--------------------------------------------------------------------|
        | embeddings           | normal, standard deviation `initializer_range`; 0 for padding      |
        | projections          | normal, standard deviation fan_in ** -0.5; biases 0 (of the decay: |
        |                      | a memory that is written in full decays by half the maximal rate)  |
        | residual projections | 0: every block starts as the identity                              |
        | slice projections    | identity on the channels that embedding and core both have         |
        | normalisations       | 1, biases 0                                                        |
        | step gate            | 0.1: steps after the first start small                             |
        | convolutions         | uniform within kernel_size ** -0.5                                 |
        | neural memories      | normal, standard deviation fan_in ** -0.5                          |
        | RWKV's decay, bonus, | as in RWKV-4, halfway up: see `TimeMix`, `TokenShift`              |
        | token shift          |                                                                    |
        | actions              | weights 0, bias -3 for pop: see `ActionProjection`                 |
        """
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            init.zeros_(module.weight)
        elif isinstance(module, SliceProjection):
            init.eye_(module.weight)
        elif isinstance(module, ActionProjection):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, StepGate):
            init.constant_(module.weight, StepGate.INITIAL)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, ShortConvolution):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, NeuralMemory):
            init.normal_(module.initial_memory, std=module.head_dim**-0.5)
        elif isinstance(module, TimeMix):
            init.copy_(module.time_decay, module.initial_decay())
            init.copy_(module.time_first, module.initial_first())
        elif isinstance(module, TokenShift):
            init.copy_(module.weight, module.initial_weight())


class StackformerModel(StackformerPreTrainedModel):
    """The bare Stackformer: embeddings in, the stack's accumulated output out."""

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [StackformerCoreLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.number = new_number()
        self._mark: tuple[Any, Mark] | None = None
        # What a plain core, or a single ponder step, has no use for is not there.
        self.down_proj: nn.Module = nn.Identity()
        self.bottleneck = self.step_gate = self.action_proj = None
        self.return_norm: nn.Module = nn.Identity()
        if config.bottleneck_size is not None:
            self.down_proj = SliceProjection(config.hidden_size, config.core_size)
            self.bottleneck = StackformerBottleneck(config)
        if config.max_ponder_steps > 1:
            self.step_gate = StepGate(config.hidden_size)
            self.action_proj = ActionProjection(config.hidden_size)
            if config.stack_depth > 1:
                # Mass is first returned to a frame at the second step, and then read at the third.
                self.return_norm = NORMS[config.norm_type](
                    config.hidden_size,
                    eps=config.rms_norm_eps,
                    elementwise_affine=config.max_ponder_steps > 2,
                )
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model is another model: its weights may become others."""
        super().__setstate__(state)
        self.number, self._mark = new_number(), None

    def mark(self) -> Mark:
        """Whose memory a cache is that this model fills."""
        if torch.compiler.is_compiling():
            return Mark(self, self.number, sample=None)
        versions = tuple((id(x), -1 if x.is_inference() else x._version) for x in self.parameters())
        known = versions, active_adapters(self)
        if self._mark is None or self._mark[0] != known:
            self._mark = known, Mark(self, self.number, sample_digest(self))
        return self._mark[1]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_stack_trace: bool = False,
        halting_threshold: float | None = None,
        ponder_depths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> StackformerModelOutputWithPast:
        """Read T tokens, going on from `cache`.

        Documents packed into one row are read as if each stood alone. Where they begin is told by `seq_idx`
        [B, T], `cu_seq_lens_q` (for B = 1), or `position_ids` [B, T] that start again from 0: whatever
        [`DataCollatorWithFlattening`] returns.

        Args:
            input_ids: [B, T], or `inputs_embeds`: [B, T, D].
            attention_mask: [B, T] or [B, past + T], 0 for padding: left, right or in between.
            position_ids: see above; the model has no use for positions otherwise.
            cache: a [`StackformerCache`], updated and returned. A call that fails leaves it as it was, or, if
                it was written in place, unusable.
            use_cache: whether to return the state; by default `config.use_cache`, but not in training.
            output_hidden_states: whether to return the embeddings and every ponder step's thoughts.
            output_stack_trace: whether to return the [`StackTrace`].
            halting_threshold: in place of `config.halting_threshold`. Every call that shares a cache should
                have the same, or tokens are read to other depths than those before them.
            ponder_depths: [B, T], the ponder steps after which each token is done, instead of when its mass
                falls below `config.halting_threshold`.
            past_key_values: an older name of `cache`.
            kwargs: what transformers passes to all models and this one has no use for.

        Raises:
            TypeError: for a keyword argument that transformers does not know, either.
            ValueError: for anything else that is not as described above; the message says what is.
        """
        check_keywords(kwargs, type(self).__name__)
        cache = either_cache(cache, past_key_values)
        if kwargs.get("is_causal") is False:
            raise ValueError("`is_causal` must be True: a recurrence reads from left to right, got False")
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        if cache is not None:
            check_cache(cache, self, inputs_embeds.shape[0])
        check_padding_mask(inputs_embeds, attention_mask, cache)
        documents = packed_documents(
            inputs_embeds.shape[:2], attention_mask, position_ids, seq_idx, cu_seq_lens_q
        )
        cache = self._prepare_cache(cache, use_cache, packed=documents is not None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if halting_threshold is None:
            halting_threshold = self.config.halting_threshold
        if not 0 <= halting_threshold < 1:
            raise ValueError(
                f"`halting_threshold` must be at least 0 and less than 1, got {halting_threshold}"
            )
        self._check_checkpoints()
        layout = self._layout(inputs_embeds, attention_mask, documents)
        check_depths(ponder_depths, layout)

        ponder = self._ponder_in_turn if self.config.feedback else self._ponder
        with _undone_on_failure(cache):
            thoughts, distribution, hidden_states, trace = ponder(
                inputs_embeds,
                layout,
                cache,
                ponder_depths,
                halting_threshold,
                output_hidden_states,
                output_stack_trace,
            )
        hidden = self.norm(thoughts)
        return StackformerModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=hidden_states,
            ponder_steps=expected_steps(distribution),
            ponder_distribution=distribution,
            stack_trace=trace,
            **{CACHE_NAME: cache},
        )

    def _check_checkpoints(self) -> None:
        """Raises a ValueError for reentrant checkpoints of layers that run several times, under DDP: it would
        take the gradient of the first time for the whole one."""
        function = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        if function is None or not (self.training and self.layers[0].gradient_checkpointing):
            return
        ddp = DistributedDataParallel._get_active_ddp_module()
        if (
            ddp is not None
            and not ddp.static_graph
            and self.config.max_ponder_steps > 1
            and getattr(function, "keywords", {}).get("use_reentrant", False)
        ):
            raise ValueError(
                "`gradient_checkpointing_kwargs` must be {'use_reentrant': False} with several ponder steps "
                "and DistributedDataParallel (unless it has `static_graph=True`), got {'use_reentrant': True}"
            )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embeddings [B, T, D] of exactly one of ids [B, T] and embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is not None:
            size = self.config.hidden_size
            if (
                inputs_embeds.dim() != 3
                or inputs_embeds.shape[2] != size
                or not inputs_embeds.is_floating_point()
            ):
                raise ValueError(
                    f"`inputs_embeds` must be floating-point numbers [batch, time, {size}], got "
                    f"{inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}"
                )
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"`input_ids` must be integers (int64 or int32) [batch, time], got {input_ids.dtype} of "
                f"shape {tuple(input_ids.shape)}"
            )
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise ValueError(
                f"`input_ids` must be from 0 to {self.embed_tokens.num_embeddings - 1}, got ids from "
                f"{int(input_ids.min())} to {int(input_ids.max())}"
            ) from error

    def _ponder_in_turn(
        self, embeds: Tensor, layout: TokenLayout, cache: Cache | None, depths: Tensor | None, *options
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None, StackTrace | None]:
        """`_ponder` with feedback: one token of each row after the other, each with all of its ponder steps,
        which share one slice of state: what the last step writes is what the next token's first step reads.
        """
        if layout.documents is not None:
            rows = _map_tensors(lambda x: layout.to_rows(layout.gather(x)), (embeds, depths))
            return _map_tensors(
                lambda x: layout.scatter(
                    layout.to_tokens(x), x.new_zeros(layout.batch_size, layout.length, *x.shape[2:])
                ),
                self._ponder_in_turn(rows[0], layout.as_batch(), None, rows[1], *options),
            )
        cache = StackformerCache(self.config) if cache is None else cache
        if layout.length <= 1:
            return self._ponder(embeds, layout, cache, depths, *options)
        results = [
            self._ponder(embeds[:, span], part, cache, None if depths is None else depths[:, span], *options)
            for span, part in layout.one_by_one()
        ]
        return _map_tensors(lambda *parts: torch.cat(parts, dim=1), *results)

    def _ponder(
        self,
        embeds: Tensor,
        layout: TokenLayout,
        cache: Cache | None,
        depths: Tensor | None,
        threshold: float,
        all_thoughts: bool,
        with_trace: bool,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None, StackTrace | None]:
        """Ponder until every token's stack is empty: outputs [B, T, D], distribution over steps [B, T, P]."""
        config = self.config
        # A compiled graph cannot depend on which tokens are done: there, tokens are masked, not left out.
        masked = torch.compiler.is_compiling() and embeds.shape[1] == 1
        embedding = layout.gather(embeds)
        stack = init_stack(embedding, config.stack_depth, config.max_ponder_steps)
        if layout.thinking is not None:  # padding has no mass
            stack = stack._replace(pointer=stack.pointer * layout.thinking.unsqueeze(-1))
        latest, hidden_states, steps = embeds, [embeds], []
        finished: list[tuple[Tensor, ...]] = []  # positions, outputs, distributions
        steps_left, hooks = range(0), mixed_batch_hooks(self)

        for step in range(1, config.max_ponder_steps + 1):
            if layout.num_tokens == 0:
                steps_left = range(step, config.max_ponder_steps + 1)
                break
            with adapters_by_token(hooks, layout):
                thought, bank_weights = self._think(stack, layout, step - 1, cache)
                actions = self._actions(thought)
            if with_trace:
                steps.append(self._trace_step(layout, stack.pointer, actions, bank_weights))
            if all_thoughts:
                latest = layout.scatter(thought, latest)
                hidden_states.append(latest)

            if step == config.max_ponder_steps:
                all_tokens = torch.ones_like(stack.pointer[:, 0], dtype=torch.bool)
                stack = flush_stack(stack, all_tokens, thought, step)
                break
            stack = step_stack(stack, actions, thought, embedding, step, self.return_norm)
            if depths is not None:
                done = layout.gather(depths) <= step
            elif threshold > 0:
                done = stack.pointer.sum(-1) < threshold
            else:
                continue
            stack = flush_stack(stack, done, thought, step)
            if masked:
                staying = ~done if layout.thinking is None else layout.thinking & ~done
                layout = layout.masked(staying)
                continue
            leaving = done.nonzero().squeeze(-1)
            if len(leaving) > 0:
                results = (x.index_select(0, leaving) for x in (stack.output, stack.dropped))
                finished.append((layout.places(leaving), *results))
                staying = (~done).nonzero().squeeze(-1)
                layout, stack = layout.select(staying), Stack(*(x.index_select(0, staying) for x in stack))
                embedding = embedding.index_select(0, staying)

        outputs, distribution = layout.spread(finished, (stack.output, stack.dropped))
        if steps_left and self._is_shared(cache):
            outputs = self._keep_up(outputs, embeds, steps_left, cache)
        elif steps_left and torch.is_grad_enabled():
            outputs = self._keep_in_graph(outputs, steps_left)
        if cache is not None:
            for cache_layer in cache.layers:
                cache_layer.advance(embeds.shape[1])
        hidden_states += [latest] * (config.max_ponder_steps + 1 - len(hidden_states))
        trace = self._stack_steps(steps) if steps else None
        return outputs, distribution, tuple(hidden_states) if all_thoughts else None, trace

    def _actions(self, thought: Tensor) -> Tensor:
        """Probabilities of push, no-op and pop [n, 3]. A model made for one step always returns."""
        dtype = at_least_float32(thought)
        if self.action_proj is None:
            pop = torch.arange(3, device=thought.device) == POP
            return pop.to(dtype).expand(len(thought), 3)
        # Over D normalised channels small steps of all weights add up: scaled, actions learn slowly.
        logits = self.action_proj(thought * thought.shape[-1] ** -0.5)
        return logits.to(dtype).softmax(-1)

    def _is_shared(self, cache: Cache | None) -> bool:
        """Whether other processes take part in each run of the core: its weights are gathered from them, or
        its state comes from them."""
        if cache is not None and cache.layers[0].is_shared:
            return True
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        if is_deepspeed_zero3_enabled():
            return True
        return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in self.modules())

    def _keep_in_graph(self, outputs: Tensor, steps_left: range) -> Tensor:
        """`outputs`, unchanged, as a function of the parameters that no token needed: where gradients are
        exchanged (DDP), every process must have one for each of them."""
        if steps_left.start > 2:
            return outputs
        # After a single step, nothing has read what it wrote to the frames, and no gate was needed.
        unused = [self] if steps_left.start == 1 else [self.step_gate, self.return_norm]
        parameters = [x for module in unused if module is not None for x in module.parameters()]
        sums = [x.sum().to(outputs.device) for x in parameters if x.requires_grad]
        return outputs + 0 * torch.stack(sums).sum() if sums else outputs

    def _keep_up(self, outputs: Tensor, embeds: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """Ponder about nothing for the steps that are left; `outputs` unchanged.

        A process whose tokens are all done has to run the core as often as the others do: a sharded layer
        is gathered from all processes each time it runs, all must have a gradient of each parameter, and a
        sequence that is split over them has states that all take part in.
        """
        # Made of the outputs, so that the backward pass, too, comes by here before the steps that were real.
        # A token that is no number must stay the only one.
        embedding = (outputs[:, 0] + embeds[:, 0]).nan_to_num()
        nobody = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
        layout = TokenLayout.full(len(embedding), 1).masked(nobody)
        stack = init_stack(embedding, self.config.stack_depth, self.config.max_ponder_steps)
        weightless = torch.zeros_like(stack.pointer)  # writes nothing, decays nothing
        shared = cache if cache is not None and cache.layers[0].is_shared else None
        for step in steps:
            stack = stack._replace(pointer=weightless)
            thought, _ = self._think(stack, layout, step - 1, shared)
            stack = step_stack(stack, self._actions(thought), thought, embedding, step, self.return_norm)
        return outputs + 0 * (thought.sum() + stack.frames.sum()).nan_to_num()

    def _think(
        self, stack: Stack, layout: TokenLayout, step: int, cache: Cache | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor] | None]]:
        """Apply the core, on its state at ponder step `step`, the first being 0: thoughts [n, D] and bank
        weights."""
        index = 0 if self.config.feedback else step
        superposition = read_stack(stack)
        hidden = self.down_proj(superposition)
        bank_weights = []
        for layer_idx, layer in enumerate(self.layers):
            cache_layer = None if cache is None else cache.layers[layer_idx]
            state = None if cache_layer is None else cache_layer.read(index, layout)
            if cache_layer is not None:
                cache_layer.record(index, layer.advance, hidden, stack.pointer, layout)
            if callable(state):
                state = (state,)
            hidden, weights, *new_state = layer(hidden, stack.pointer, layout, *(state or ()))
            bank_weights.append(weights)
            if cache_layer is not None:
                cache_layer.write(index, tuple(new_state), layout)
        thought = hidden if self.bottleneck is None else self.bottleneck(hidden, superposition)
        if self.step_gate is not None and step > 0:
            thought = self.step_gate(superposition, thought)
        return thought, bank_weights

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, packed: bool) -> Cache | None:
        """The cache to go on from, a new one, or none."""
        if packed:
            if cache is not None or use_cache:
                raise ValueError(
                    "`cache` and `use_cache` must be None with packed documents, each of which ends in a "
                    f"state of its own, got {type(cache).__name__} and {use_cache}"
                )
            return None
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return StackformerCache(self.config).bind(self.mark()) if use_cache else None
        return cache

    @staticmethod
    def _layout(embeds: Tensor, attention_mask: Tensor | None, documents: Tensor | None) -> TokenLayout:
        batch_size, length = embeds.shape[:2]
        if attention_mask is None:
            if documents is None:
                return TokenLayout.full(batch_size, length)
            attention_mask = torch.ones_like(documents)
        active = attention_mask[:, attention_mask.shape[1] - length :].bool()
        if torch.compiler.is_compiling() and length == 1:
            return TokenLayout.full(batch_size, 1).masked(active.squeeze(1))
        return TokenLayout.from_mask(active, documents)

    @staticmethod
    def _trace_step(
        layout: TokenLayout, pointer: Tensor, actions: Tensor, bank_weights: list
    ) -> list[Tensor]:
        """One ponder step of a trace: its tensors for all tokens [B, T, ...], zeros for inactive ones."""
        active = layout.thinking
        if active is None:
            active = torch.ones_like(pointer[:, 0], dtype=torch.bool)
        traced = [active, pointer, actions]
        some = next((weights for weights in bank_weights if weights is not None), None)
        if some is not None:
            none = tuple(map(torch.zeros_like, some))
            by_layer = [none if weights is None else weights for weights in bank_weights]
            traced += [torch.stack(weights, dim=1) for weights in zip(*by_layer, strict=True)]
        return [
            layout.scatter(x, x.new_zeros(layout.batch_size, layout.length, *x.shape[1:])) for x in traced
        ]

    def _stack_steps(self, steps: list[list[Tensor]]) -> StackTrace:
        missing = self.config.max_ponder_steps - len(steps)
        padded = steps + [[torch.zeros_like(x) for x in steps[0]]] * missing
        return StackTrace(*(torch.stack(tensors, dim=2) for tensors in zip(*padded, strict=True)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value


def _map_tensors(function: Callable[..., Tensor], *trees):
    """What `function` makes of the tensors in their places in the trees, all of them alike."""
    return tree_map(lambda *leaves: None if leaves[0] is None else function(*leaves), *trees)


@contextmanager
def _undone_on_failure(cache: Cache | None) -> Iterator[None]:
    """A call that fails, or is interrupted, leaves the cache as it was, or marked as unusable."""
    undo = [] if cache is None else [layer.begin_call() for layer in cache.layers]
    try:
        yield
    except BaseException:
        for function in undo:
            function()
        raise


class StackformerForCausalLM(StackformerPreTrainedModel, StackformerGenerationMixin):
    """Stackformer with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        self.model = StackformerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        halting_threshold: float | None = None,
        num_items_in_batch: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> StackformerCausalLMOutputWithPast:
        """See [`StackformerModel.forward`]. `generate` takes `halting_threshold`, too.

        Args:
            labels: [B, T], shifted inside; -100 is ignored, and so is what padding and the last token of a
                document would predict. The loss is the cross-entropy, in training plus
                `config.ponder_loss_coef` times the mean ponder loss (`config.ponder_loss_type`) of the tokens
                that predict a label.
            logits_to_keep: the last positions to compute logits for; 0 for all, or a tensor of positions.
            num_items_in_batch: what the sums of the losses are divided by; the number of labels if `None`.
            kwargs: among others `shift_labels` [B, T], in place of `labels`: the label of each token.
        """
        # Not in the signature: the Trainer would ask for all that is called labels there.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            halting_threshold=halting_threshold,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **kwargs,
        )
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(
                f"`logits_to_keep` must be 0 (all), or a number of positions, got {logits_to_keep}"
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            shape, ignored = outputs.last_hidden_state.shape[:2], kwargs.get("ignore_index", -100)
            if logits.shape[:2] != shape:
                raise ValueError(f"`logits_to_keep` must be 0 with labels, got {logits_to_keep}")
            check_num_items(num_items_in_batch)
            documents = packed_documents(shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
            shift_labels = label_each_token(shape, labels, shift_labels, attention_mask, documents, ignored)
            try:
                loss = self.loss_function(
                    logits=logits,
                    labels=shift_labels,
                    shift_labels=shift_labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    **kwargs,
                )
            except IndexError as error:
                raise ValueError(
                    f"`labels` must be from 0 to {self.config.vocab_size - 1}, or {ignored} for none: {error}"
                ) from error
            if self.training and self.config.ponder_loss_coef > 0:
                counted = shift_labels != ignored
                ponder_loss = self._ponder_loss(outputs, counted, num_items_in_batch)
                loss = loss + self.config.ponder_loss_coef * ponder_loss
        return StackformerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            ponder_steps=outputs.ponder_steps,
            ponder_distribution=outputs.ponder_distribution,
            stack_trace=outputs.stack_trace,
            **{CACHE_NAME: outputs.cache},
        )

    @torch.no_grad()
    def stack_trace(self, text: str | Tensor, tokenizer: PreTrainedTokenizerBase) -> TextTrace:
        """What the model did at every token of a text: shown by a notebook, or `to_html` and `to_png`.

            model.stack_trace("Once upon a time", tokenizer).to_html("trace.html")

        Args:
            text: a string, or ids [T] or [1, T], such as `generate` returns.
            tokenizer: the model's tokenizer.

        Raises:
            ValueError: if the text has no token, or is a batch of several rows.
        """
        ids = tokenizer(text, return_tensors="pt").input_ids if isinstance(text, str) else text
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            raise ValueError(
                f"`text` must be one text of at least one token, got ids of shape {tuple(ids.shape)}"
            )
        ids = ids.to(self.device, torch.long)  # the ids of an empty string have no integer type
        outputs = self(ids, use_cache=False, output_stack_trace=True)
        return TextTrace.from_outputs(ids, outputs, tokenizer)

    def _ponder_loss(self, outputs, counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Mean ponder loss over the tokens that are `counted` [B, T], reduced as the cross-entropy is."""
        if self.config.ponder_loss_type == "geometric_prior":
            losses = divergence_from_geometric(outputs.ponder_distribution, self.config.ponder_prior)
        else:
            losses = outputs.ponder_steps
        total = (losses * counted.to(losses.device)).sum()
        return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class StackformerForSequenceClassification(GenericForSequenceClassification, StackformerPreTrainedModel):
    """Stackformer with a classifier on the last token that is not padding."""


class StackformerForTokenClassification(GenericForTokenClassification, StackformerPreTrainedModel):
    """Stackformer with a classifier on every token."""


__all__ = [
    "StackTrace",
    "StackformerForCausalLM",
    "StackformerForSequenceClassification",
    "StackformerForTokenClassification",
    "StackformerModel",
    "StackformerPreTrainedModel",
]
