# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Stackformer configuration: the fields, the sizes derived from them, and their validation."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

PONDER_LOSS_TYPES = ("expected_steps", "geometric_prior")
FEED_FORWARD_TYPES = ("gated", "rwkv_channel_mix")
NORM_TYPES = ("rms_norm", "layer_norm")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
FEATURE_MAP_NAMES = ("elu_plus_one", "relu", "softplus", "softmax", "exp")


def _is_integer(value, least: int) -> bool:
    """Whether a value is an integer, not a bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value) -> bool:
    """Whether a value is a finite number, not a bool, of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_widths(value) -> bool:
    """Whether a value is a list of at least one finite number above 0."""
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(_is_number(width) and width > 0 for width in value)


def _are_half_lives(value) -> bool:
    """Whether a value is two finite numbers above 0 in ascending order."""
    return _are_widths(value) and len(value) == 2 and value[0] <= value[1]


def _is_rope(value) -> bool:
    """Whether a value describes the default rotary positions, as in transformers."""
    if not isinstance(value, dict) or not value.keys() <= {"rope_type", "rope_theta"}:
        return False
    theta = value.get("rope_theta", 1.0)
    return value.get("rope_type", "default") == "default" and _is_number(theta) and theta > 0


class Rule(NamedTuple):
    """A condition on the value of one field, independent of the other fields, and its description."""

    holds: Callable[[Any], bool]
    expected: str


COUNT = Rule(lambda x: _is_integer(x, least=1), "an integer of at least 1")
OPTIONAL_COUNT = Rule(lambda x: x is None or _is_integer(x, least=1), "an integer of at least 1, or None")
NOT_NEGATIVE = Rule(_is_number, "a finite number of at least 0")
POSITIVE = Rule(lambda x: _is_number(x) and x > 0, "a number above 0")
UP_TO_ONE = Rule(lambda x: _is_number(x) and 0 < x <= 1, "a number above 0 and at most 1")
OPTIONAL_POSITIVE = Rule(lambda x: x is None or _is_number(x) and x > 0, "a number above 0, or None")
FRACTION = Rule(lambda x: _is_number(x) and 0 < x < 1, "a number above 0 and less than 1")


def _one_of(names: tuple[str, ...]) -> Rule:
    """Returns the rule that a value is one of `names`."""
    return Rule(lambda x: x in names, f"one of {names}")


RULES: dict[str, Rule] = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_memory_banks": COUNT,
    "stack_depth": COUNT,
    "max_ponder_steps": COUNT,
    "conv_kernel_size": COUNT,
    "memory_depth": COUNT,
    "memory_chunk_size": COUNT,
    "memory_block": COUNT,
    "num_basis_functions": COUNT,
    "num_banks_per_tok": OPTIONAL_COUNT,
    "bottleneck_size": OPTIONAL_COUNT,
    "intermediate_size": OPTIONAL_COUNT,
    "bottleneck_intermediate_size": OPTIONAL_COUNT,
    "chunk_size": OPTIONAL_COUNT,
    "sliding_window": OPTIONAL_COUNT,
    "coupled_state_size": OPTIONAL_COUNT,
    "fast_weights_steps": COUNT,
    "fast_weights_decay": UP_TO_ONE,
    "fast_weights_rate": NOT_NEGATIVE,
    "feedback": Rule(lambda x: isinstance(x, bool), "True or False"),
    "num_persistent_tokens": Rule(lambda x: _is_integer(x, least=0), "an integer of at least 0"),
    "ponder_loss_coef": NOT_NEGATIVE,
    "density_loss_coef": NOT_NEGATIVE,
    "max_decay_rate": NOT_NEGATIVE,
    "initial_half_lives": Rule(_are_half_lives, "two numbers above 0, the shorter one first"),
    "max_step_size": Rule(lambda x: _is_number(x) and 0 < x <= 2, "a number above 0 and at most 2"),
    "initializer_range": NOT_NEGATIVE,
    "memory_max_step_size": NOT_NEGATIVE,
    "memory_max_surprise": OPTIONAL_POSITIVE,
    "halting_threshold": Rule(lambda x: _is_number(x) and x < 1, "a number of at least 0 and less than 1"),
    "memory_contraction": FRACTION,
    "memory_ridge": POSITIVE,
    "density_prior_width": POSITIVE,
    "density_prior_mean": Rule(
        lambda x: x is None or (_is_number(x) and x <= 1), "a number of at least 0 and at most 1, or None"
    ),
    "basis_widths": Rule(lambda x: x is None or _are_widths(x), "numbers above 0, or None"),
    "ponder_loss_type": _one_of(PONDER_LOSS_TYPES),
    "ponder_prior": FRACTION,
    "rms_norm_eps": POSITIVE,
    "hidden_act": Rule(
        lambda x: isinstance(x, str) and x in ACT2FN, "the name of an activation in transformers.activations"
    ),
    "feed_forward_type": _one_of(FEED_FORWARD_TYPES),
    "norm_type": _one_of(NORM_TYPES),
    "feature_map": _one_of(FEATURE_MAP_NAMES),
    "rope_parameters": Rule(
        lambda x: not x or _is_rope(x),
        'a dict of `rope_theta`, a finite number above 0, and `rope_type`, which is "default"',
    ),
}


FLAGSHIP = ("banked_linear_attention", "banked_delta_rule")  # the mixers of the layers, in turn


class StackformerConfig(PreTrainedConfig):
    r"""Configuration of a [`StackformerModel`]. The defaults give a byte-level model of 5 million parameters.

    Args:
        vocab_size (`int`, defaults to 261): Number of tokens. The default is that of the byte tokenizer: 256
            bytes and 5 special tokens.
        hidden_size (`int`, defaults to 512): Size D of the embeddings and of the frames of the processing
            stack.
        bottleneck_size (`int`, *optional*, defaults to 256): Width d of the recurrent core. A projection
            leads from the embedding to the core. `None` leaves out the bottleneck: the core has the width of
            the embedding.
        num_hidden_layers (`int`, defaults to 4): Core layers L, each a mixer and a feed-forward.
        num_attention_heads (`int`, defaults to 4): Heads H of each mixer; must divide the core's width.
        intermediate_size (`int`, *optional*): Inner width of the core's feed-forward; 3 times the core's
            width if `None`.
        bottleneck_intermediate_size (`int`, *optional*): Inner width of the feed-forward that joins the
            core's output to the embedding; `hidden_size` if `None`.
        num_memory_banks (`int`, defaults to 4): Memories N per head and stack level. A softmax weights them.
        num_banks_per_tok (`int`, *optional*): Number of banks of each head that a token writes to, and reads.
            Writes and reads choose separately the banks of the largest weights, which stay as the softmax
            over all banks gives them. The other banks have weight 0, and keep their content to the last bit.
            This saves no time. With 1, the choice of reads hardly learns, because what is read is normalised.
            All banks if `None`.
        stack_depth (`int`, defaults to 3): Levels S of the processing stack.
        max_ponder_steps (`int`, defaults to 4): Ponder steps P after which every token halts.
        halting_threshold (`float`, defaults to 0.01): A token halts when less probability mass than this is
            left on its stack. Later steps do not compute it. 0 computes every token at every step.
        ponder_loss_coef (`float`, defaults to 0.0): Weight of the ponder loss in the training loss.
        ponder_loss_type (`str`, defaults to `"expected_steps"`): The ponder loss of a token. "expected_steps"
            is its mean number of ponder steps (Graves 2016). "geometric_prior" is the divergence of its
            distribution over halting steps from a truncated geometric one, in nats (Banino et al. 2021,
            "PonderNet").
        ponder_prior (`float`, defaults to 0.2): Probability of halting at each step in that geometric
            distribution.
        max_decay_rate (`float`, defaults to 1.0): Largest decay of a memory per token, in nats, for a token
            that writes with weight 1. With 0, memories never decay.
        initial_half_lives (`list[float]`, defaults to `[1.0, 1024.0]`): Shortest and longest half-life of the
            memories of a layer at initialisation, in tokens that write evenly to all banks. The banks of all
            heads are spread evenly between the two on a logarithmic scale. None forgets faster than
            `max_decay_rate` allows. The half-lives of the delta rule, which corrects instead of forgetting,
            are 16 times as long.
        max_step_size (`float`, defaults to 2.0): The largest fraction of its error that the delta rule
            corrects per token, at most 2. Above 1, memories have transitions with negative eigenvalues, which
            track state (Grazzi et al. 2024).
        feature_map (`str`, defaults to `"elu_plus_one"`): Map of queries and keys to non-negative features.
            One of "elu_plus_one", "relu", "softplus", "softmax", "exp".
        conv_kernel_size (`int`, defaults to 4): Number of tokens that the causal convolution over queries,
            keys and values sees.
        feedback (`bool`, defaults to `False`): Whether the ponder steps share one state. The first step of a
            token then reads the state after all steps of the tokens before it, so tokens are computed one
            after another, which is slow. Such a model can track state that a model parallel over time
            cannot.
        chunk_size (`int`, *optional*): Tokens per chunk in training and prefill. It changes the speed, not
            the results. `None` takes the size that was measured to be fastest.
        mixer_types (`list[str]`, *optional*): The mixer of each core layer, or a list of one for all of them:
            "banked_linear_attention", "banked_delta_rule" (the delta rule on banks of memories), "attention"
            (softmax attention), "fast_weights" (a recurrent cell with fast weights and an inner loop),
            "fixed_size_attention" (sums of f f^T), "coupled" (a reversible recurrent cell), "coupled_angles"
            (the same with states that wrap around, so that no token fades), "rwkv" (RWKV-4's time mix),
            "neural_memory" (the memory of Titans alone), "memory_as_gate" (that memory times softmax
            attention), "memory_as_context" (softmax attention inside of segments, with that memory as
            context) or "continuous_attention" (infinity-former). "banked_linear_attention" and
            "banked_delta_rule" in turn if `None`: sums predict text best, and corrections recall and track
            state (docs/experiments.md). docs/adding_a_mixer.md shows how to add your own.
        feed_forward_type (`str`, defaults to `"gated"`): The feed-forward of the core layers, "gated" or
            "rwkv_channel_mix" (that of RWKV-4, which also sees the previous token).
        coupled_state_size (`int`, *optional*): Size of each of the two states of the coupled cell, in either
            form; half the core's width, rounded up, if `None`.
        fast_weights_steps (`int`, defaults to 1): Inner steps S for which each token settles in the
            fast weights of "fast_weights" (Ba et al. 2016).
        fast_weights_decay (`float`, defaults to 0.95): Factor by which these fast weights, and the matrix of
            "fixed_size_attention" (de Brebisson & Vincent 2016), decay per token.
        fast_weights_rate (`float`, defaults to 0.5): Weight with which a token is added to either.
        sliding_window (`int`, *optional*): Number of tokens that softmax attention sees, including the token
            itself, at any position of any text. If `None`, it sees all tokens, and its state grows.
        num_persistent_tokens (`int`, defaults to 0): Learned tokens that softmax attention always sees, in
            front of all others and outside of any window. With a window, they are never further away than
            `sliding_window` tokens.
        memory_depth (`int`, defaults to 2): Layers of the network of a neural memory; 1 is linear.
        memory_chunk_size (`int`, defaults to 16): Tokens per chunk of a neural memory, counted from the first
            token of each row. The gradients of a chunk are taken at the same weights. For
            "memory_as_context", a chunk is also a segment. Unlike `chunk_size`, it changes the results: 1 is
            the exact gradient for every token, and slow.
        memory_max_step_size (`float`, defaults to 0.05): Largest step theta of a neural memory along a
            gradient. One step changes the error of its token by at most 2 theta times itself. The steps of a
            chunk add up, so tokens with equal keys overshoot if theta times `memory_chunk_size` is above 1.
        memory_max_surprise (`float`, *optional*, defaults to 10.0): Largest norm of a token's gradient in a
            neural memory, over all layers of a head. Longer gradients are scaled down to it. The default is
            rarely reached; with 1, nearly all gradients have the same norm. With `None`, the memory may
            overflow if steps overshoot.
        rope_parameters (`dict`, *optional*): Rotary positions of softmax attention, as in transformers:
            `rope_theta`, 10000.0 if not given, and `rope_type`, which must be "default".
        memory_block (`int`, defaults to 64): Tokens per block that continuous attention takes into its
            long-term memory. `sliding_window` must be at least as long.
        num_basis_functions (`int`, defaults to 64): Radial basis functions N of that memory. The memory is
            sampled at as many positions when it is contracted.
        basis_widths (`list[float]`, *optional*): Standard deviations of the basis functions on [0, 1]. All
            have the same number of centres. The only width is 1.5 / N if `None`.
        memory_contraction (`float`, defaults to 0.75): The old signal of that memory is contracted to
            [0, tau] when a block is taken in. This is tau.
        memory_ridge (`float`, defaults to 0.1): Penalty of the ridge regression that fits the memory.
        sticky_memories (`bool`, defaults to `False`): Whether the old signal is sampled most densely where
            tokens attended most, instead of uniformly.
        density_loss_coef (`float`, defaults to 0.0): Weight in the training loss of the divergence of the
            Gaussian densities with which tokens attend to that memory from a prior (Martins et al. 2022,
            which calls the weight lambda_KL; their code has 1e-6 for language models).
        density_prior_width (`float`, defaults to 0.05): Standard deviation sigma_0 of that prior on [0, 1].
        density_prior_mean (`float`, *optional*): Mean of that prior. If `None`, it is the mean of the density
            itself, so only the width of the density is penalised.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated feed-forwards.
        norm_type (`str`, defaults to `"rms_norm"`): The normalisations outside of the mixers, "rms_norm" or
            "layer_norm" (with biases).
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the normalisations, of either type.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial embeddings.
            Projections have a standard deviation of fan_in ** -0.5, and residual projections start at 0.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the output projection is the embedding
            matrix.
        use_cache (`bool`, defaults to `True`): Whether to return the recurrent state, except in training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens. The defaults are those
            of the byte tokenizer, or None if the vocabulary is too small for them.

    Raises:
        ValueError: for a value out of range. The message names the field, the value and the expected values.

    Example:

    ```python
    >>> from stackformer import StackformerConfig, StackformerForCausalLM

    >>> model = StackformerForCausalLM(StackformerConfig(num_memory_banks=8))
    ```
    """

    model_type = "stackformer"
    keys_to_ignore_at_inference = [
        "cache", "past_key_values", "ponder_steps", "ponder_distribution", "stack_trace",
    ]  # fmt: skip

    vocab_size: int = 261
    hidden_size: int = 512
    bottleneck_size: int | None = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
    bottleneck_intermediate_size: int = None  # type: ignore[assignment]
    num_memory_banks: int = 4
    num_banks_per_tok: int | None = None
    stack_depth: int = 3
    max_ponder_steps: int = 4
    halting_threshold: float = 0.01
    ponder_loss_coef: float = 0.0
    ponder_loss_type: str = "expected_steps"
    ponder_prior: float = 0.2
    max_decay_rate: float = 1.0
    initial_half_lives: list[float] = None  # type: ignore[assignment]
    max_step_size: float = 2.0
    feature_map: str = "elu_plus_one"
    conv_kernel_size: int = 4
    feedback: bool = False
    chunk_size: int | None = None
    mixer_types: list[str] = None  # type: ignore[assignment]
    feed_forward_type: str = "gated"
    coupled_state_size: int = None  # type: ignore[assignment]
    fast_weights_steps: int = 1
    fast_weights_decay: float = 0.95
    fast_weights_rate: float = 0.5
    sliding_window: int | None = None
    num_persistent_tokens: int = 0
    memory_depth: int = 2
    memory_chunk_size: int = 16
    memory_max_step_size: float = 0.05
    memory_max_surprise: float | None = 10.0
    rope_parameters: dict = None  # type: ignore[assignment]
    memory_block: int = 64
    num_basis_functions: int = 64
    basis_widths: list[float] = None  # type: ignore[assignment]
    memory_contraction: float = 0.75
    memory_ridge: float = 0.1
    sticky_memories: bool = False
    density_loss_coef: float = 0.0
    density_prior_width: float = 0.05
    density_prior_mean: float | None = None
    hidden_act: str = "silu"
    norm_type: str = "rms_norm"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: int | list[int] | None = 258

    def __post_init__(self, **kwargs):
        if isinstance(self.num_hidden_layers, int):
            if self.mixer_types is None:
                self.mixer_types = [FLAGSHIP[i % len(FLAGSHIP)] for i in range(self.num_hidden_layers)]
            elif isinstance(self.mixer_types, (list, tuple)) and len(self.mixer_types) == 1:
                self.mixer_types = list(self.mixer_types) * self.num_hidden_layers
        if self.initial_half_lives is None:
            self.initial_half_lives = [1.0, 1024.0]
        if isinstance(self.vocab_size, int):
            for name in SPECIAL_TOKENS:
                default = getattr(type(self), name)
                if getattr(self, name) == default and default >= self.vocab_size:
                    setattr(self, name, None)
        self.validate()
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.core_size
        if self.bottleneck_intermediate_size is None:
            self.bottleneck_intermediate_size = self.hidden_size
        if self.basis_widths is None:
            self.basis_widths = [1.5 / self.num_basis_functions]
        if self.coupled_state_size is None:
            self.coupled_state_size = (self.core_size + 1) // 2
        super().__post_init__(**kwargs)

    @property
    def core_size(self) -> int:
        """Width d of the recurrent core."""
        return self.hidden_size if self.bottleneck_size is None else self.bottleneck_size

    @property
    def num_slices(self) -> int:
        """Slices of recurrent state in each core layer: one per ponder step, or only one with feedback."""
        return 1 if self.feedback else self.max_ponder_steps

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache of each layer, for transformers' caches.

        It is not a saved field, because transformers refuses names that it does not know if it loads a
        configuration without this code.
        """
        return ["stackformer"] * self.num_hidden_layers

    def validate(self) -> None:
        """Raises a ValueError for the first invalid field. transformers also calls it before saving."""
        for name, rule in RULES.items():
            self._require(name, rule.holds(getattr(self, name)), rule.expected)
        self._require(
            "basis_widths",
            self.basis_widths is None or self.num_basis_functions % len(self.basis_widths) == 0,
            f"as many numbers as divide num_basis_functions={self.num_basis_functions}, or None",
        )
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple))
            self._require(
                name,
                value is None
                or all(
                    _is_integer(x, least=0) and x < self.vocab_size for x in (value if several else [value])
                ),
                f"a token id below vocab_size={self.vocab_size}, or None",
            )
        self._require(
            "num_attention_heads",
            self.core_size % self.num_attention_heads == 0,
            f"a divisor of the core's width {self.core_size} (`bottleneck_size` or `hidden_size`)",
        )
        self._require(
            "num_banks_per_tok",
            self.num_banks_per_tok is None or self.num_banks_per_tok <= self.num_memory_banks,
            f"at most num_memory_banks={self.num_memory_banks}, or None",
        )
        self._require(
            "mixer_types",
            isinstance(self.mixer_types, (list, tuple))
            and len(self.mixer_types) == self.num_hidden_layers
            and all(isinstance(name, str) for name in self.mixer_types),
            f"a list of num_hidden_layers={self.num_hidden_layers} names, or of one",
        )

    def _require(self, name: str, condition: bool, expected: str) -> None:
        """Raises a ValueError that names field `name` and its value unless `condition` holds."""
        if not condition:
            raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}")


__all__ = ["StackformerConfig"]
