"""The configuration of linear attention in both directions; the papers' layers are its values."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from gatedjax.config.checks import Checked, Count, Range, Seed, Size, SizeOrZero
from gatedjax.config.features import WIDER_MAPS, feature_dim
from gatedjax.errors import require


@dataclass(frozen=True)
class BidirectionalLinearAttentionConfig(Checked):
    """Attention of encoders without a matrix of all pairs.

    A feature map, a normalization, decays, a local term, gates.

    `BIDIRECTIONAL` has the papers' layers as values of these keys.
    """

    kind: Literal["bidirectional_linear_attention"] = "bidirectional_linear_attention"
    num_heads: Size = 4
    # channels per head
    key_dim: Size = 32
    value_dim: Size = 32
    # Height and width of the image whose patches the last tokens are, row by row. (): as the
    # patches of the model lie, or a sequence.
    grid: tuple[Size, ...] = ()
    # Tokens that there are parameters for: of a gate or a bias of every position.
    length: Count | None = None
    # features: linear attention. gaussian: SOFT's kernel and landmarks, where queries are the keys.
    # manhattan: softmax along rows, then columns, of windows.
    form: Literal["features", "gaussian", "manhattan"] = "features"
    feature_map: Literal[
        "identity",
        "silu",
        "elu_plus_one",
        "relu",
        "unit_silu",
        "norm_aware",
        "cosformer",
        "favor+",
    ] = "elu_plus_one"
    # as of gated linear attention
    feature_length: Count = 4096
    num_features: Size | None = None
    feature_seed: Seed = 0
    # What sums over values are divided by, or corrected with; see layers/bidirectional/sums.py.
    normalization: Literal["none", "length", "sum", "mala", "inline"] = "sum"
    # LION: one a head, or one a token and head. vector: ViG, two scans with decays of their own.
    decay: Literal["none", "constant", "scalar", "vector"] = "none"
    # channels between the two matrices of a vector decay
    decay_rank: Size = 16
    decay_temperature: Annotated[float, Range(1e-3)] = 16.0
    # The order of tokens that decays go by: as they stand, or the mean of a walk by rows and one by
    # columns, every other one backward.
    order: Literal["raster", "serpentine"] = "raster"
    # rope: of the sums over values; on a grid by row and column. relative: a learned bias for every
    # distance, by FFT.
    positions: Literal["none", "rope", "relative"] = "none"
    # queries and keys of length 1 before the feature map
    qk_norm: bool = False
    # LayerNorm of each head's keys and values (galerkin) or queries and keys (fourier), before the
    # product
    operator_norm: Literal["none", "galerkin", "fourier"] = "none"
    # coordinates of the tokens beside the channels of queries, keys and values
    coordinates: bool = False
    # keys and values times a learned number for every position and head, 1 at the start
    kv_gate: bool = False
    # gaussian: every landmark is made of a square, or stretch, of so many tokens a side
    landmark_size: Size = 2
    iterations: Annotated[int, Range(1, 100)] = 20
    # manhattan: the side of windows, None for one window; and by how much they are moved
    window: Size | None = None
    window_shift: SizeOrZero = 0
    # A depthwise convolution that is added: of the values, or of the layer's input. first: queries,
    # keys and values are made of what it makes of the input. dynamic: of the values, with weights
    # that are made of the mean over tokens.
    local: Literal["none", "values", "input", "first", "dynamic"] = "none"
    # tokens that it sees along each axis
    local_width: Annotated[int, Range(1, 63)] = 3
    # with local "first": g attention + (1 - g) convolution, both normed, with g = sigmoid(x W + b)
    local_gate: bool = False
    # of the output: each head by itself, or LayerNorm of all channels
    output_norm: Literal["none", "rms", "layer"] = "none"
    output_gate: Literal["none", "linear", "swish", "sigmoid"] = "none"
    chunk_size: Size | None = None

    def check(self) -> None:
        require(len(self.grid) in (0, 2), "grid", self.grid, "a height and a width, or ()")
        self._check_form()
        self._check_decay()
        self._check_positions()
        self._check_local()

    only_causal = None

    @property
    def not_causal(self) -> str:
        """Why a causal model cannot have this mixer."""
        return "bidirectional_linear_attention: tokens see later ones"

    @property
    def features_per_head(self) -> int:
        """Channels of a head's features, of queries and keys."""
        return feature_dim(self.feature_map, self.key_dim, self.num_features)

    def _check_form(self) -> None:
        if self.form == "features":
            return
        # What only features have.
        plain = {
            "decay": self.decay == "none",
            "positions": self.positions == "none",
            "operator_norm": self.operator_norm == "none",
            "coordinates": not self.coordinates,
            "kv_gate": not self.kv_gate,
        }
        for name, is_plain in plain.items():
            require(is_plain, name, getattr(self, name), f"none of it with form {self.form!r}")

    def _check_decay(self) -> None:
        normalization = {"constant": "sum", "scalar": "sum", "vector": "none"}.get(self.decay)
        require(
            normalization in (None, self.normalization),
            "normalization",
            self.normalization,
            f"{normalization!r} with decay {self.decay!r}",
        )
        is_wider = self.feature_map in WIDER_MAPS
        require(
            self.decay != "vector" or not is_wider,
            "feature_map",
            self.feature_map,
            "a map of channels with decay 'vector'",
        )
        is_ordered = self.order == "raster" or self.decay in ("constant", "scalar")
        expected = "'raster' unless decay is 'constant' or 'scalar'"
        require(is_ordered, "order", self.order, expected)

    def _check_positions(self) -> None:
        needs_length = {
            "kv_gate": self.kv_gate,
            "positions 'relative'": self.positions == "relative",
        }
        for option, is_needed in needs_length.items():
            require(
                self.length is not None or not is_needed,
                "length",
                self.length,
                f"a number of tokens with {option}",
            )
        require(
            self.positions == "none" or self.decay == "none",
            "positions",
            self.positions,
            f"'none' with decay {self.decay!r}",
        )
        require(
            self.positions != "relative" or self.normalization == "sum",
            "normalization",
            self.normalization,
            "'sum' with positions 'relative'",
        )
        if self.positions == "rope":
            require(
                self.key_dim % 2 == 0 and self.feature_map not in ("favor+", "cosformer"),
                "positions",
                self.positions,
                "'none' unless key_dim is even and features are channels",
            )
        require(
            self.operator_norm == "none" or self.feature_map == "identity",
            "feature_map",
            self.feature_map,
            f"'identity' with operator_norm {self.operator_norm!r}",
        )
        require(
            not self.coordinates or self.feature_map == "identity",
            "feature_map",
            self.feature_map,
            "'identity' with coordinates",
        )

    def _check_local(self) -> None:
        is_odd = self.local_width % 2 == 1
        require(is_odd, "local_width", self.local_width, "an odd number of tokens")
        require(
            not self.local_gate or self.local == "first",
            "local_gate",
            self.local_gate,
            "false unless local is 'first'",
        )
        require(
            not self.coordinates or self.local in ("none", "first"),
            "local",
            self.local,
            "'none' or 'first' with coordinates, which values have too",
        )


def _preset(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType(values)


_LION = _preset(feature_map="unit_silu", normalization="sum")
_OPERATOR = _preset(feature_map="identity", normalization="length", coordinates=True)
_LEPE = _preset(local="values", local_width=5)

# The layers of the papers. Heads, channels, grid and length are the user's.
BIDIRECTIONAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # LION, arXiv 2502.16249: without decays, with one a head, with one a token and head.
        "lion_lit": _preset(feature_map="elu_plus_one", normalization="sum"),
        "lion_d": _preset(**_LION, decay="constant"),
        "lion_s": _preset(**_LION, decay="scalar"),
        # ViG, arXiv 2405.18425
        "vig": _preset(
            feature_map="identity",
            normalization="none",
            decay="vector",
            local="first",
            local_width=3,
            local_gate=True,
        ),
        # LINA, arXiv 2601.22630
        "lina": _preset(
            feature_map="relu",
            normalization="sum",
            kv_gate=True,
            local="input",
            local_width=5,
        ),
        # MALA, arXiv 2507.00698
        "mala": _preset(
            feature_map="elu_plus_one",
            normalization="mala",
            positions="rope",
            output_gate="linear",
            **_LEPE,
        ),
        # InLine, arXiv 2412.06590
        "inline": _preset(
            feature_map="identity",
            normalization="inline",
            local="dynamic",
            local_width=3,
        ),
        # NaLaFormer, arXiv 2506.21137
        "nalaformer": _preset(
            feature_map="norm_aware",
            normalization="sum",
            positions="rope",
            output_norm="layer",
            output_gate="swish",
            **_LEPE,
        ),
        # cosFormer, arXiv 2202.08791; Performer, arXiv 2009.14794
        "cosformer": _preset(feature_map="cosformer", normalization="sum"),
        "performer": _preset(feature_map="favor+", normalization="sum"),
        # arXiv 2105.14995
        "galerkin": _preset(**_OPERATOR, operator_norm="galerkin"),
        "fourier": _preset(**_OPERATOR, operator_norm="fourier"),
        # Kernelized attention with relative positions, arXiv 2106.12566
        "fft_rpe": _preset(
            feature_map="favor+",
            normalization="sum",
            qk_norm=True,
            positions="relative",
        ),
        # SOFT, arXiv 2110.11945
        "soft": _preset(form="gaussian", local="values", local_width=3),
        # Gated-SwinRMT with retention, arXiv 2604.06014
        "gated_swin_rmt": _preset(form="manhattan", output_gate="sigmoid", **_LEPE),
    }
)
