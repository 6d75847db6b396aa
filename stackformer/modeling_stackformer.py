# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The Stackformer model: a recurrent core in a bottleneck, applied once per ponder step.

- Embeddings (D) are large and the recurrent core (d) is small. A projection leads into the core, and a
  feed-forward joins its result with the embedding.
- Core layers mix tokens through a bank of linear-attention memories. The state does not grow.
- Every ponder step moves probability mass on a differentiable stack. Each token's output is the sum of its
  thoughts, weighted by the mass that the bottom level pops at each step.
- Padding and tokens that have halted are gathered out. They cost no time and do not change the state.

Letters: B batch, T time, D hidden size, d core width, n active tokens, S stack levels, P ponder steps.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import initialization as init
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import can_return_tuple, logging

from .cache_stackformer import (
    StackformerCache,
    StackformerCacheLayer,
    StackformerStaticCacheLayer,
    call_of_model,
    check_cache,
)
from .configuration_stackformer import SPECIAL_TOKENS, StackformerConfig
from .core_stackformer import ActionProjection, StackformerBottleneck, StackformerCoreLayer, StepGate
from .generation_stackformer import StackformerGenerationMixin
from .identity import Mark, active_adapters, new_number, sample_digest
from .labels import check_num_items, label_each_token
from .layers_stackformer import NORMS, ResidualProjection, ShortConvolution, SliceProjection, TokenShift
from .mixer_bank import DecayProjection
from .mixer_banked_delta_rule import StepProjection
from .mixer_fast_weights import RecurrentProjection
from .mixer_neural_memory import NeuralMemory
from .mixer_rwkv import TimeMix
from .pondering import PonderOptions, ponder
from .processing_stack import divergence_from_geometric, expected_steps
from .stack_trace import StackTrace, TextTrace
from .token_layout import lay_out
from .versions import CACHE_NAME, CacheNames, check_arguments

logger = logging.get_logger(__name__)

# The class of each auto class, as `file.class`: saved in config.json together with the code.
AUTO_MAP = {
    "AutoConfig": "configuration_stackformer.StackformerConfig",
    "AutoModel": "modeling_stackformer.StackformerModel",
    "AutoModelForCausalLM": "modeling_stackformer.StackformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_stackformer.StackformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_stackformer.StackformerForTokenClassification",
}

# These two entries make `DynamicCache(config=...)` and `StaticCache(config=...)` build Stackformer layers.
DYNAMIC_LAYER_TYPE_MAPPING["stackformer"] = StackformerCacheLayer
STATIC_LAYER_TYPE_MAPPING["stackformer"] = StackformerStaticCacheLayer

# The Trainer's label smoothing shifts the labels only for models in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["stackformer"] = "StackformerForCausalLM"


@dataclass
class StackformerModelOutputWithPast(CacheNames, BaseModelOutputWithPast):
    """Base class for the model's outputs.

    Args:
        last_hidden_state (`torch.FloatTensor` [B, T, D]): the accumulated output of the stack, normalised.
        cache ([`StackformerCache`]): the recurrent state after the last token, also as `past_key_values`.
        hidden_states (`tuple(torch.FloatTensor)`): with `output_hidden_states=True`, P + 1 tensors [B, T, D]:
            the embeddings, and the thoughts of all tokens after each ponder step.
        ponder_steps (`torch.FloatTensor` [B, T]): expected number of ponder steps of each token, 0 for
            padding. Gradients flow through it.
        ponder_distribution (`torch.FloatTensor` [B, T, P]): the mass that each token dropped at each ponder
            step, which is its distribution over halting steps. Zeros for padding. Gradients flow through it.
        stack_trace ([`StackTrace`]): with `output_stack_trace=True`. `None` if all tokens are padding.
        mixer_loss (`torch.FloatTensor` [B, T]): the losses of the mixers of each token, which is in training
            with `density_loss_coef` above 0 the divergence of its densities, and 0 for padding. Gradients
            flow through it.
    """

    ponder_steps: Tensor | None = None
    ponder_distribution: Tensor | None = None
    stack_trace: StackTrace | None = None
    mixer_loss: Tensor | None = None


@dataclass
class StackformerCausalLMOutputWithPast(CacheNames, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with `ponder_steps`, `ponder_distribution` and `stack_trace`.

    See [`StackformerModelOutputWithPast`] for these three.
    """

    ponder_steps: Tensor | None = None
    ponder_distribution: Tensor | None = None
    stack_trace: StackTrace | None = None


class StackformerPreTrainedModel(PreTrainedModel):
    """Initialises weights, and declares the properties of the architecture that transformers reads."""

    config: StackformerConfig
    config_class = StackformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StackformerCoreLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _can_compile_fullgraph = True
    # The implementations of softmax attention that a configuration may choose.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: StackformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if "rwkv" in config.mixer_types:  # half precision would round small decays to none
            self._keep_in_fp32_modules_strict = {"time_decay", "time_first"}
        # Each model has its own list, because transformers adds to it in place.
        self.model_tags = ["stackformer"]

    def save_pretrained(self, *args, **kwargs) -> None:
        """Saves the model as transformers does, with its code, and names the class of each auto class."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes as transformers does. Cut-off special tokens become `None` in the configuration."""
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
        """Initialises one module. transformers calls this for every module that has parameters of its own.

        | what                 | initial value                                                      |
        |----------------------|--------------------------------------------------------------------|
        | embeddings           | normal, standard deviation `initializer_range`; 0 for padding      |
        | projections          | normal, standard deviation fan_in ** -0.5; biases 0                |
        | decays of banks      | weights as in projections, biases for half-lives on a log scale    |
        | reads of banks       | biases against the weight of slow banks: see `ReadProjection`      |
        | step sizes           | biases for a quarter of the largest: see `StepProjection`          |
        | residual projections | 0: every block starts as the identity                              |
        | slice projections    | identity on the channels that embedding and core both have         |
        | recurrent projection | 0.05 times the identity: see `RecurrentProjection`                 |
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
        elif isinstance(module, (DecayProjection, StepProjection)):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, StepGate):
            init.constant_(module.weight, StepGate.INITIAL)
        elif isinstance(module, RecurrentProjection):
            init.copy_(module.weight, module.initial_weight())
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
    """The bare Stackformer: maps embeddings to the accumulated output of the stack."""

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [StackformerCoreLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.number = new_number()
        self._mark: tuple[Any, Mark] | None = None
        # A core without bottleneck and a model of one ponder step leave out the modules that they do not use.
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
                # Step 2 is the first to return mass to a frame, and step 3 the first to read that frame. So
                # a model of two steps has no use for the weights of this normalisation.
                self.return_norm = NORMS[config.norm_type](
                    config.hidden_size,
                    eps=config.rms_norm_eps,
                    elementwise_affine=config.max_ponder_steps > 2,
                )
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy of the model a number of its own, because the weights of the two may diverge."""
        super().__setstate__(state)
        self.number, self._mark = new_number(), None

    def mark(self) -> Mark:
        """Returns the mark that this model puts on the caches it fills, with its present weights."""
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
        """Reads T tokens, which continue the sequences in `cache`.

        Documents that are packed into one row do not see each other. Their boundaries are given by `seq_idx`
        [B, T], by `cu_seq_lens_q` (for B = 1), or by `position_ids` [B, T] that start again from 0. These are
        the forms that [`DataCollatorWithFlattening`] returns.

        Args:
            input_ids: [B, T]. Give either these or `inputs_embeds` [B, T, D].
            attention_mask: [B, T] or [B, past + T], 0 for padding, which may stand anywhere in a row.
            position_ids: [B, T], used only to find packed documents, as above.
            cache: a [`StackformerCache`], updated and returned. A call that fails leaves the cache as it was;
                if it had already written in place, the cache refuses further calls.
            use_cache: whether to return the state; by default `config.use_cache`, but not in training.
            output_hidden_states: whether to return the embeddings and the thoughts of every ponder step.
            output_stack_trace: whether to return the [`StackTrace`].
            halting_threshold: replaces `config.halting_threshold`. All calls that share a cache should use
                the same value. Otherwise their tokens are computed to different depths.
            ponder_depths: [B, T], the number of ponder steps after which each token halts. It replaces
                halting by `halting_threshold`.
            past_key_values: an older name of `cache`.
            kwargs: arguments that transformers passes to all models and that this model ignores.

        Raises:
            TypeError: for a keyword argument that transformers does not know.
            ValueError: for any other argument that differs from the description above. The message states
                the expected and the given value.
        """
        cache = check_arguments(kwargs, type(self).__name__, cache, past_key_values)
        if kwargs.get("is_causal") is False:
            raise ValueError("`is_causal` must be True: a recurrence reads from left to right, got False")
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        shape = inputs_embeds.shape[:2]
        if cache is not None:
            check_cache(cache, self, shape[0])
        layout = lay_out(shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q, cache)
        cache = self._prepare_cache(cache, use_cache, packed=layout.documents is not None)
        self._check_checkpoints(cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if halting_threshold is None:
            halting_threshold = self.config.halting_threshold
        if not 0 <= halting_threshold < 1:
            raise ValueError(
                f"`halting_threshold` must be at least 0 and less than 1, got {halting_threshold}"
            )

        options = PonderOptions(halting_threshold, ponder_depths, output_hidden_states, output_stack_trace)
        with nullcontext() if cache is None else call_of_model(cache, shape[1]):
            pondered = ponder(self, inputs_embeds, layout, cache, options)
        return StackformerModelOutputWithPast(
            last_hidden_state=self.norm(pondered.output),
            hidden_states=pondered.thoughts,
            ponder_steps=expected_steps(pondered.distribution),
            ponder_distribution=pondered.distribution,
            stack_trace=pondered.trace,
            mixer_loss=pondered.mixer_loss,
            **{CACHE_NAME: cache},
        )

    def _check_checkpoints(self, cache: Cache | None) -> None:
        """Raises a ValueError for reentrant checkpoints where their gradients would be wrong.

        There are two such cases. DDP would take the gradient of a layer's first run for the whole gradient if
        the layer runs several times. And a reentrant checkpoint cuts a layer's state off from the graph.
        """
        function = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        if function is None or not (self.training and self.layers[0].gradient_checkpointing):
            return
        if not getattr(function, "keywords", {}).get("use_reentrant", False):
            return
        found = "got {'use_reentrant': True}"
        if torch.is_grad_enabled() and (cache is not None or self.config.feedback):
            raise ValueError(
                "`gradient_checkpointing_kwargs` must be {'use_reentrant': False} with feedback, or with a "
                f"cache in training, {found}"
            )
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None and not ddp.static_graph and self.config.max_ponder_steps > 1:
            raise ValueError(
                "`gradient_checkpointing_kwargs` must be {'use_reentrant': False} with several ponder steps "
                f"and DistributedDataParallel (unless it has `static_graph=True`), {found}"
            )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Returns embeddings [B, T, D], looked up or given. Exactly one of the arguments must be given."""
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

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, packed: bool) -> Cache | None:
        """Returns the given cache, or a new one if `use_cache` asks for it, or `None`."""
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
        """Reads T tokens and predicts the token after each. See [`StackformerModel.forward`].

        `generate` accepts `halting_threshold`, too.

        Args:
            labels: [B, T], shifted inside the model. Labels of -100 are ignored. Padding and the last token
                of a document predict no label. The loss is the cross-entropy. In training, two terms are
                added, each a mean over the tokens that predict a label: `config.ponder_loss_coef` times the
                ponder loss (`config.ponder_loss_type`), and `config.density_loss_coef` times the divergence
                of the densities of continuous attention.
            logits_to_keep: the number of last positions to compute logits for, 0 for all, or a tensor of
                positions.
            num_items_in_batch: the divisor of the summed losses; the number of labels if `None`.
            kwargs: may contain `shift_labels` [B, T] in place of `labels`: the label each token predicts.
        """
        # `shift_labels` is not in the signature, because the Trainer expects each batch to contain every
        # argument of the signature that has "label" in its name.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
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
            if num_items_in_batch is not None:
                check_num_items(num_items_in_batch)
            shift_labels = label_each_token(
                shape, labels, shift_labels, attention_mask, position_ids, seq_idx, cu_seq_lens_q, ignored
            )
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
            if self.training:
                counted = shift_labels != ignored
                for coef, losses in self._added_losses(outputs):
                    loss = loss + coef * _mean_loss(losses, counted, num_items_in_batch)
        return StackformerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            ponder_steps=outputs.ponder_steps,
            ponder_distribution=outputs.ponder_distribution,
            stack_trace=outputs.stack_trace,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    @torch.no_grad()
    def stack_trace(self, text: str | Tensor, tokenizer: PreTrainedTokenizerBase) -> TextTrace:
        """Runs the model on a text and records the processing stack at every token.

        A notebook displays the result; `to_html` and `to_png` write it to a file.

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
        ids = ids.to(self.device, torch.long)  # a tokenizer returns the ids of an empty string as floats
        outputs = self(ids, use_cache=False, output_stack_trace=True)
        return TextTrace.from_outputs(ids, outputs, tokenizer, self.config)

    def _added_losses(self, outputs: Any) -> list[tuple[float, Tensor]]:
        """Returns the coefficient and the losses [B, T] of each term that training adds."""
        added: list[tuple[float, Tensor]] = []
        if self.config.ponder_loss_coef > 0 and self.config.ponder_loss_type == "geometric_prior":
            losses = divergence_from_geometric(outputs.ponder_distribution, self.config.ponder_prior)
            added.append((self.config.ponder_loss_coef, losses))
        elif self.config.ponder_loss_coef > 0:
            added.append((self.config.ponder_loss_coef, outputs.ponder_steps))
        if outputs.mixer_loss is not None:
            added.append((self.config.density_loss_coef, outputs.mixer_loss))
        return added


def _mean_loss(losses: Tensor, counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Returns the losses [B, T] of the tokens in `counted` [B, T], reduced as the cross-entropy is."""
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
