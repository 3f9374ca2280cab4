"""The T5 encoders of the official models, computed by `transformers`; `state_dict()` has the official names.

Shapes: B prompts, L tokens of the longest of them, D width.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rcm.artefact import UserError, reason

# transformers' names of an encoder's tensors and the official ones, as replacements that are made one after another
_UMT5 = (
    ("embed_tokens.", "token_embedding."),
    ("block.", "blocks."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
    (".layer.1.layer_norm.", ".norm2."),
    ("final_layer_norm.", "norm."),
)
_T5 = (("block.", "encoder.block."), ("final_layer_norm.", "encoder.final_layer_norm."), ("embed_tokens.", "shared."))

_SPARE = 1024  # a token embedding has fewer rows without a token than this


class T5Encoder(nn.Module):
    """Encode prompts as Wan2.1 (kind "umt5") or Cosmos-Predict2 (kind "t5") does.

    umT5 has gated GELUs, relative positions in every block and the names of Wan's own file, and cleans its prompts. T5
    has ReLUs, the relative positions of its first block in all of them and the names of its file on the Hub, which
    holds a decoder too: names that begin with `ignored_prefixes` are not part of the encoder.

    `tokenizer`, from the function of that name, must be set before prompts are encoded.
    """

    KINDS = ("umt5", "t5")

    def __init__(
        self,
        *,
        kind: str,
        tokens: int,
        width: int,
        mlp_width: int,
        layers: int,
        heads: int,
        head_width: int,
        vocabulary: int,
        buckets: int,
        distance: int,
    ):
        super().__init__()
        self.kind, self.tokens, self.width, self.vocabulary = kind, tokens, width, vocabulary
        self.tokenizer: Any = None
        self.ignored_prefixes = () if kind == "umt5" else ("decoder.", "lm_head.", "encoder.embed_tokens.")
        self.stack: Any = _stack(
            kind,
            d_model=width,
            d_ff=mlp_width,
            num_layers=layers,
            num_heads=heads,
            d_kv=head_width,
            vocab_size=vocabulary,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=distance,
            dropout_rate=0.0,
        )
        self.names = {_official(name, _UMT5 if kind == "umt5" else _T5): name for name in self.stack.state_dict()}
        self.register_state_dict_post_hook(_to_official_names)
        self.register_load_state_dict_pre_hook(_from_official_names)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """All tokens of each prompt, the end token included.

        Raises ValueError without a tokenizer, UserError for that of another model.
        """
        if self.tokenizer is None:
            raise ValueError("this encoder has no tokenizer: set .tokenizer = rcm.text.tokenizer(folder)")
        size = self.tokenizer.get_vocab_size()
        if not self.vocabulary - _SPARE < size <= self.vocabulary:
            raise UserError(
                f"the tokenizer has {size} tokens, the {self.kind} encoder {self.vocabulary}: it belongs to another"
                " model; give the tokenizer that comes with the encoder"
            )
        texts = [clean(prompt) for prompt in prompts] if self.kind == "umt5" else list(prompts)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of the prompts that have more than `tokens` tokens and lose those behind."""
        return [number for number, ids in enumerate(self.token_ids(prompts)) if len(ids) > self.tokens]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts: float32 (B, tokens, width), computed in the type and on the device of the weights.

        A prompt that is too long keeps its first tokens and the end token. Raises ValueError for float16, in which T5
        overflows, and what `token_ids` raises.
        """
        weight = self.stack.embed_tokens.weight
        if weight.dtype == torch.float16:
            raise ValueError("T5 overflows in float16: expected float32 or bfloat16")
        rows = [
            torch.tensor(ids if len(ids) <= self.tokens else [*ids[: self.tokens - 1], ids[-1]], dtype=torch.long)
            for ids in self.token_ids(prompts)
        ]
        encoded_BLD = torch.zeros(len(rows), self.tokens, self.width, dtype=torch.float32, device=weight.device)
        if rows:
            ids_BL = pad_sequence(rows, batch_first=True)
            mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(weight.device)
            hidden_BLD = self.stack(input_ids=ids_BL.to(weight.device), attention_mask=mask_BL).last_hidden_state
            encoded_BLD[:, : ids_BL.shape[1]] = hidden_BLD.float().masked_fill(mask_BL[..., None] == 0, 0)
        return encoded_BLD


def _stack(kind: str, **sizes: Any) -> Any:
    """The encoder alone: in `EncoderModel` its token embedding is there twice, tied, which `to_empty` would untie."""
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    if kind == "umt5":
        return transformers.UMT5EncoderModel(transformers.UMT5Config(feed_forward_proj="gated-gelu", **sizes)).encoder
    return transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="relu", **sizes)).encoder


def _official(name: str, replacements: Sequence[tuple[str, str]]) -> str:
    for ours, official in replacements:
        name = name.replace(ours, official)
    return name


def _to_official_names(module: T5Encoder, state: dict[str, Tensor], prefix: str, _: Mapping[str, Any]) -> None:
    for official, name in module.names.items():
        state[prefix + official] = state.pop(f"{prefix}stack.{name}")


def _from_official_names(module: T5Encoder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for official, name in module.names.items():
        if prefix + official in state:
            state[f"{prefix}stack.{name}"] = state.pop(prefix + official)


def clean(prompt: str) -> str:
    """A prompt as Wan2.1 prepares it: broken Unicode and HTML entities repaired, white space collapsed."""
    try:
        import ftfy
    except ImportError as error:
        raise _missing("ftfy") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokenizer(folder: Path | str) -> Any:
    """Open the `tokenizer.json` in a folder, as a `tokenizers.Tokenizer`; UserError where it is missing or damaged.

    The file is taken as it is: transformers 5 builds T5's tokenizer anew from parts of it, so that what it gives
    depends on the version.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise _missing("transformers") from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a folder with the tokenizer of the text encoder")
    try:
        opened = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception of its own
        raise UserError(f"{path} is damaged or not a tokenizer ({reason(error)}); download it again") from error
    opened.no_truncation()
    opened.no_padding()
    return opened


def _missing(package: str) -> UserError:
    """What to say where a package of the extra `models` is not installed."""
    return UserError(f"the text encoder needs the package {package}: install it with `pip install -e .[models]`")
