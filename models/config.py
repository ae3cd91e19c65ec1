"""The shape of a decoder, and the presets."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from crescendo.models.low_precision import RECIPES, check_widths
from crescendo.ranges import Count, Decay, NotNegative, OneOf, Positive, check_fields

Remat = Literal["none", "dots", "full"]
Dtype = Literal["float32", "bfloat16"]
Router = Literal["softmax", "sigmoid"]
Balance = Literal["loss", "bias"]

SPEED_FIELDS = ("scan_layers", "remat", "dtype", "matmul")
"""The fields of a model that say how fast it runs and not what it computes."""


EXPERT_FIELDS = (
    *("experts", "experts_per_token", "moe_every", "expert_width", "shared_expert_width", "router"),
    *("balance", "balance_loss", "router_z_loss", "expert_capacity"),
)
"""The fields of a model that mean something only where it has experts."""


def identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration, a dataclass, but `SPEED_FIELDS`."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SPEED_FIELDS}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Args:
      vocab_size: rows of the embedding, V.
      width: the residual width, D.
      layers: the number of blocks, L.
      heads: query heads, H.
      kv_heads: key and value heads, K; H must be a multiple of it.
      mlp_width: the feed-forward width, F.
      head_width: the width of one head, E; `width / heads` when None.
      qk_norm: normalise queries and keys per head before the rotation.
      tied_head: use the embedding as the output matrix.
      logit_soft_cap: `c` of `c tanh(logits / c)`, or None.
      z_loss: the coefficient of `log^2 Z` in the training loss (PaLM uses 1e-4).
      rope_theta: the base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      shared_layers: give all layers one block's weights, and each norms of its own (as ALBERT; with experts WideNet,
        Xue et al. 2021, https://arxiv.org/abs/2107.11817).
      dropout: in training, the probability with which each element of what a branch adds to the residual stream is 0;
        the others are divided by `1 - dropout` (Srivastava et al. 2014).
      scan_layers: run the layers in a loop (compiles fast) or unrolled (runs fast). The parameters are stacked on a
        leading axis either way, so checkpoints fit both. None: unrolled up to 24 layers on GPUs and up to 4
        elsewhere; on one H100 unrolled was measured 1.35x faster at 12 layers.
      remat: what the backward pass recomputes: "none"; "dots" keeps the results of the weight matmuls; "full" keeps
        only each layer's input.
      dtype: "float32" or "bfloat16", that of the matmuls and activations (parameters are float32). None: bfloat16
        on accelerators and under a recipe, else float32 on the CPU.
      matmul: the recipe of the blocks' matmuls, by name: "dtype" multiplies in `dtype`; "fp8" in 8 bits, and
        "fp8-hadamard" with rotations before; "nvfp4" emulates 4 bits (`crescendo.models.low_precision.RECIPES`).
      experts: how many feed-forward parts a layer with experts has, X, in place of one (`crescendo.models.moe`); None:
        no layer has any.
      experts_per_token: to how many of them a token goes, k.
      moe_every: every so many layers one has experts, the last of them; it must divide `layers`.
      expert_width: an expert's feed-forward width; None: `mlp_width`, which is that of layers without experts.
      shared_expert_width: that of an expert besides, to which every token goes; None: there is none.
      router: what makes shares of the router's logits: "softmax", over all experts (Shazeer et al. 2017), or "sigmoid",
        of each (DeepSeek-V3).
      balance: what keeps the experts' loads even: "loss", a term of the training loss, or "bias", a number for each
        expert that is added where experts are chosen and learns from their loads alone.
      balance_loss: the coefficient of the balance loss, or of the gradient of the bias.
      router_z_loss: the coefficient of `log^2 Z` of the router (ST-MoE uses 1e-3).
      expert_capacity: c: of a row's T tokens an expert takes at most `ceil(c k T / X)`, and further ones pass it by.
        None: every token gets its experts (dropless).

    Raises:
      ValueError: for a field out of its range, heads that don't divide, a recipe with float32 or with widths that
        aren't multiples of 16, experts that the rest doesn't fit, or what is about experts where there are none.

    >>> ModelConfig.preset("debug").head_size
    32
    """

    vocab_size: Count = 384
    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    kv_heads: Count = 2
    mlp_width: Count = 384
    head_width: Count | None = None
    qk_norm: bool = True
    tied_head: bool = True
    logit_soft_cap: Positive | None = None
    z_loss: NotNegative = 0.0
    rope_theta: Positive = 10_000.0
    norm_epsilon: Positive = 1e-6
    shared_layers: bool = False
    dropout: Decay = 0.0
    scan_layers: bool | None = None
    remat: Remat = "none"
    dtype: Dtype | None = None
    matmul: Annotated[str, OneOf(RECIPES)] = "dtype"
    experts: Count | None = None
    experts_per_token: Count = 2
    moe_every: Count = 1
    expert_width: Count | None = None
    shared_expert_width: Count | None = None
    router: Router = "softmax"
    balance: Balance = "loss"
    balance_loss: NotNegative = 0.01
    router_z_loss: NotNegative = 0.001
    expert_capacity: Positive | None = None

    def __post_init__(self):
        check_fields(self)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}, or set head_width")
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"a head of width {self.head_size} must be even: rotary positions turn pairs")
        if self.experts is not None:
            self._check_experts(self.experts)
        else:
            self._check_no_experts()
        if self.matmul != "dtype":
            self._check_matmul()

    def _check_experts(self, experts: int) -> None:
        if self.experts_per_token > experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} is more than experts = {experts}: use at most {experts}"
            )
        if self.layers % self.moe_every:
            raise ValueError(
                f"layers = {self.layers} must be a multiple of moe_every = {self.moe_every}, as every so many layers "
                "one has experts"
            )
        if self.shared_layers and self.moe_every > 1:
            raise ValueError(
                f"moe_every = {self.moe_every} makes layers differ, to which shared_layers = True gives one block's "
                "weights: use moe_every = 1, or shared_layers = False"
            )

    def _check_no_experts(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in EXPERT_FIELDS and value != field.default:
                raise ValueError(
                    f"{field.name} = {value!r} says nothing of a model without experts: set experts, or leave it out"
                )

    def _check_matmul(self) -> None:
        if self.dtype == "float32":
            raise ValueError(f"matmul = {self.matmul!r} needs dtype = 'bfloat16', not 'float32', or leave dtype out")
        projections = {"heads x head width": self.heads, "kv_heads x head width": self.kv_heads}
        widths = {"width": self.width} | {name: heads * self.head_size for name, heads in projections.items()}
        if self.sparse_layers < self.layers:
            widths["mlp_width"] = self.mlp_width
        if self.shared_expert_width is not None:
            widths["shared_expert_width"] = self.shared_expert_width
        check_widths(self.matmul, **widths)

    @property
    def identity(self) -> dict[str, Any]:
        """What the model computes, as JSON: every field but those that only say how fast.

        `dropout` and `shared_layers` are there only where they say something, and what is about experts only where
        there are any, so that models from before these were fields are what they were.

        >>> ModelConfig().identity == ModelConfig(remat="full", scan_layers=True, matmul="fp8").identity
        True
        """
        silent = tuple(name for name in ("dropout", "shared_layers") if not getattr(self, name))
        unused = silent + (EXPERT_FIELDS if self.experts is None else ())
        return {name: value for name, value in identity(self).items() if name not in unused}

    @property
    def head_size(self) -> int:
        """The width of one head, E: `head_width`, or what `width` and `heads` make it."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def expert_size(self) -> int:
        """The feed-forward width of an expert: `expert_width`, or `mlp_width`."""
        return self.mlp_width if self.expert_width is None else self.expert_width

    def without_experts(self) -> "ModelConfig":
        """The model whose layers all have one feed-forward part."""
        fields = (field for field in dataclasses.fields(self) if field.name in EXPERT_FIELDS)
        defaults: dict[str, Any] = {field.name: field.default for field in fields}
        return dataclasses.replace(self, **defaults)

    @property
    def sparse_layers(self) -> int:
        """How many layers have experts."""
        return 0 if self.experts is None else self.layers // self.moe_every

    def feed_forward_parameters(self, experts: int) -> int:
        """The matrices of all layers' feed-forward parts, with so many of a layer's experts."""
        dense = (self.layers - self.sparse_layers) * self.mlp_width
        of_experts = experts * self.expert_size + (self.shared_expert_width or 0)
        routers = self.sparse_layers * (self.experts or 0)
        return self.width * (3 * (dense + self.sparse_layers * of_experts) + routers)

    def expert_rows(self, length: int) -> int | None:
        """How many of a row's tokens an expert takes at most; None: all.

        Args:
          length: tokens in a row, T.

        Raises:
          ValueError: an even share of the row that is below one token.

        >>> ModelConfig(experts=8, experts_per_token=2, expert_capacity=1.25).expert_rows(64)
        20
        """
        if self.experts is None or self.expert_capacity is None:
            return None
        rows = self.expert_capacity * self.experts_per_token * length / self.experts
        if rows < 1:
            least = self.experts / (self.experts_per_token * length)
            raise ValueError(
                f"expert_capacity = {self.expert_capacity:g} gives an expert {rows:.2g} of a row's {length} tokens, "
                f"less than one: use at least {math.ceil(1e4 * least) / 1e4:g}, or None to drop no token"
            )
        return math.ceil(rows)

    @classmethod
    def preset(cls, name: str, **changes) -> "ModelConfig":
        """One of `PRESETS` by name, with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    def for_platform(self, platform: str) -> "ModelConfig":
        """This configuration with `scan_layers` and `dtype` decided for "cpu", "gpu" or "tpu"."""
        unrolled_layers = 24 if platform == "gpu" else 4
        narrow = platform != "cpu" or self.matmul != "dtype"
        return dataclasses.replace(
            self,
            scan_layers=self.layers > unrolled_layers if self.scan_layers is None else self.scan_layers,
            dtype=("bfloat16" if narrow else "float32") if self.dtype is None else self.dtype,
        )

    def flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """Forward and backward matmul FLOPs a token, causal attention counted at half: `6 N + 6 L H E T`.

        N counts the parameters that multiply each token: every matrix, the output matrix once, the look-up not, and of
        the experts those that a token goes to. With `causal=False` attention counts `12 L H E T`.

        >>> round(ModelConfig.preset("124m").flops_per_token(1024) / 1e6)
        798
        """
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        active = self.feed_forward_parameters(self.experts_per_token)
        matrices = self.layers * attention + active + self.vocab_size * self.width
        mixing = self.layers * self.heads * self.head_size * sequence_length
        return 6.0 * matrices + (6.0 if causal else 12.0) * mixing


PRESETS = {
    "debug": ModelConfig(),
    "30m": ModelConfig(vocab_size=16_384, width=512, layers=6, heads=8, kv_heads=8, mlp_width=1664),
    "124m": ModelConfig(vocab_size=50_304, width=768, layers=12, heads=12, kv_heads=12, mlp_width=2048),
    "1b": ModelConfig(
        vocab_size=128_256, width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, rope_theta=500_000.0
    ),
    "70b": ModelConfig(
        vocab_size=128_256,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        mlp_width=28_672,
        tied_head=False,
        rope_theta=500_000.0,
        remat="full",
    ),
    "moe-debug": ModelConfig(experts=8, experts_per_token=2, expert_width=192),
    "moe-300m": ModelConfig(
        vocab_size=50_304, width=768, layers=12, heads=12, kv_heads=12, mlp_width=2048, experts=16, expert_width=512
    ),
}
