"""CTranslate2: a folder that its own converter writes, for stock shapes.

Source: ctranslate2/converters/transformers.py of CTranslate2 4.8.5, which reads configs as transformers 4 wrote them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.exporting.base import Source
from secateur.exporting.companions import write_companions
from secateur.exporting.comparing import compared, expected
from secateur.exporting.decoder import require_no_window
from secateur.exporting.logits import inputs_of, round_
from secateur.flow.engines import CTRANSLATE2
from secateur.model.families import branches, family_of
from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError, VerificationError, first_line
from secateur.tasks.logits import Logits

HEAD_FILE = "head.safetensors"
_MARIAN = "MarianMTModel"


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the folder, and compare CTranslate2 with PyTorch on it.

    Args:
        source: The model. The converter takes it apart.
        folder: The folder.

    Returns:
        What was written, for export.json.

    Raises:
        InputError: The converter takes no such model or shape.
        VerificationError: CTranslate2 computes something else from the folder.
    """
    import ctranslate2

    model: Any = source.model
    architecture = stock_class(model).__name__
    _require_alike(model)
    round_(source)
    translates, classifies = model.config.is_encoder_decoder, architecture.endswith("Classification")
    way: _Way = (_Translator if translates else _Encoder if classifies else _Generator)(source)
    reference = expected(model, way.torch)
    head = _head(model) if classifies else {}
    names = dict(model.config.id2label) if head else {}
    zeros = _adapt_(model)
    _convert(source, folder)
    if head:
        save_file(head, folder / HEAD_FILE)
    write_companions(source, folder, config=False)
    notes = [f"the encoder alone: {HEAD_FILE} has the tensors of the classifier behind it"] if head else []
    return {
        "architecture": architecture, "zeros": zeros, "labels": names, "notes": notes,
        "verification": compared(f"ctranslate2 {ctranslate2.__version__}", way.what, reference, _run(way, folder), "texts"),
    }  # fmt: skip


def _run(way: _Way, folder: Path) -> list[Tensor]:
    """CTranslate2's outputs. Raises VerificationError where it cannot run the folder."""
    try:
        return way.engine(folder)
    except (ValueError, RuntimeError) as error:
        raise VerificationError(f"nothing was written: ctranslate2 does not run the folder: {first_line(error)}") from error


def require(model: Any, tokenizer: Any) -> None:
    """Refuse an architecture that CTranslate2's converter does not take.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        InputError: The architecture is not in `CTRANSLATE2`; a decoder attends to the last tokens alone; a BART or Marian has
            other numbers of heads in its decoder; or the padding of a Marian is not its last token.
    """
    architecture, config = stock_class(model).__name__, model.config
    if architecture not in CTRANSLATE2:
        raise InputError(f"model: expected one of {', '.join(CTRANSLATE2)} for ct2, got {architecture}")
    if architecture.endswith("ForCausalLM"):
        require_no_window(config)
    if architecture == _MARIAN and tokenizer.pad_token_id != config.vocab_size - 1:
        raise InputError(
            f"tokenizer: expected the padding as the last of {config.vocab_size} tokens, which CTranslate2's converter takes "
            f"out, got token {tokenizer.pad_token_id}"
        )
    if architecture.startswith(("Bart", "Marian")) and config.encoder_attention_heads != config.decoder_attention_heads:
        raise InputError(
            "model: expected as many heads in the decoder as in the encoder, which CTranslate2 needs, got "
            f"{config.encoder_attention_heads} in the encoder and {config.decoder_attention_heads} in the decoder"
        )


def _require_alike(model: Any) -> None:
    """Refuse a model whose shape no stock config says. The message names the first layer that differs."""
    if hasattr(model.config, "secateur"):
        raise InputError(
            f"model: expected layers that are alike, as a stock config says them, which CTranslate2 needs, got "
            f"{_first_difference(model)}; --shape stock gives such a model"
        )


def _first_difference(model: nn.Module) -> str:
    """The first branch of a model that its stock config does not say, in words."""
    family = family_of(model)
    seen: dict[str, tuple[Any, str]] = {}
    for branch in branches(model).values():
        if branch.empty:
            return f"no units in {branch.path}"
        for name, value in family.config_fields(branch).items():
            first, where = seen.setdefault(name, (value, branch.path))
            if first != value:
                return f"{name} {first} in {where} and {value} in {branch.path}"
    sizes = ", ".join(f"{name} {value}" for name, (value, _) in seen.items())
    return f"{sizes or 'parts of heads'} in all layers, which no config of {stock_class(model).__name__} says"


def _adapt_(model: Any) -> list[str]:
    """Set what the converter reads and transformers 5 no longer has. Returns what was filled with zeros."""
    config = model.config
    config.position_embedding_type = "absolute"  # BERT's kin have no other in transformers 5.
    config.normalize_before, config.normalize_embedding = False, True  # BART's norms.
    # The converter takes tied embeddings for a sign that T5 scales its outputs. mT5 ties them and never scales.
    config.tie_word_embeddings = getattr(config, "scale_decoder_outputs", False)
    body = model.base_model
    if getattr(body, "pooler", False) is None and stock_class(model).__name__.startswith("Bert"):
        body.pooler = nn.Module()
        body.pooler.dense = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.zeros_(body.pooler.dense.weight)
        nn.init.zeros_(body.pooler.dense.bias)
        return ["the pooler"]
    return []


def _head(model: Any) -> dict[str, Tensor]:
    """The tensors of a classifier behind its encoder."""
    prefix = f"{model.base_model_prefix}."
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith(prefix)}


def _convert(source: Source, folder: Path) -> None:
    """Run the converter on the model in memory.

    Raises:
        InputError: It fails.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, model_class: type[nn.Module], *_: Any, **__: Any) -> Any:
            model: Any = source.model
            return model if isinstance(model, model_class) else model.base_model

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return source.tokenizer

        def _load(self) -> Any:
            spec: Any = super()._load()
            config: Any = source.model.config
            # The converter tells the size of a head for Mistral and Qwen 3, and leaves it to hidden size / heads for these.
            if stock_class(source.model).__name__ in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
                size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
                # Of Llama 3's rotary positions, it tells two of four numbers.
                rope = config.rope_parameters
                told: dict[str, Any] = {"head_dim": np.int32(size)}
                if rope.get("rope_type") == "llama3":
                    told["rotary_scaling_factor"] = np.float32(rope["factor"])
                    told["original_max_position_embeddings"] = np.int32(rope["original_max_position_embeddings"])
                for layer in spec.decoder.layer:
                    vars(layer.self_attention).update(told)
            return spec

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source.model.config.save_pretrained(scratch)  # type: ignore[operator, union-attr]
        try:
            Converter(scratch).convert(str(Path(scratch) / "written"), quantization=_name(source.dtype))
        except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
            architecture = stock_class(source.model).__name__
            raise InputError(
                f"model: expected one that CTranslate2's converter takes, got {architecture}: {first_line(error)}"
            ) from error
        for path in (Path(scratch) / "written").iterdir():
            path.rename(folder / path.name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Way:
    """One of CTranslate2's three kinds of models: what is compared, of PyTorch and of CTranslate2.

    CTranslate2 takes the texts of a batch without padding, and pads them itself. PyTorch takes them one by one.
    """

    what: str

    def __init__(self, source: Source) -> None:
        self.batches, self.tokenizer = [_rows(batch) for batch in inputs_of(source)], source.tokenizer

    def torch(self, model: nn.Module) -> list[Tensor]:
        """Return the outputs of PyTorch's model for each text."""
        return [self.of_text(model, row) for batch in self.batches for row in batch]

    def of_text(self, model: Any, row: dict[str, Tensor]) -> Tensor:
        """Return PyTorch's outputs for one text."""
        raise NotImplementedError

    def engine(self, folder: Path) -> list[Tensor]:
        """Return CTranslate2's outputs for each text."""
        raise NotImplementedError


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The texts of a batch as batches of one, without padding."""
    rows = []
    for number, mask in enumerate(batch["attention_mask"].bool()):
        row = {name: tensor[number : number + 1] for name, tensor in batch.items()}
        rows.append({name: tensor if name.startswith("decoder") else tensor[:, mask] for name, tensor in row.items()})
    return rows


class _Translator(_Way):
    """Log-probabilities of given targets."""

    what = "log-probabilities"

    def of_text(self, model: Any, row: dict[str, Tensor]) -> Tensor:
        logits: Tensor = Logits(model)(**row)[0]  # [length, vocabulary]
        if stock_class(model).__name__ == _MARIAN:
            logits = logits[:, :-1]  # The converter takes the padding out, which is never generated.
        scores = logits.log_softmax(-1)
        target = torch.cat([row["decoder_input_ids"][0, 1:], torch.tensor([model.config.eos_token_id])])
        return scores.gather(1, target[:, None])[:, 0]

    def engine(self, folder: Path) -> list[Tensor]:
        import ctranslate2

        engine, words = ctranslate2.Translator(str(folder), **_options()), self.tokenizer.convert_ids_to_tokens
        results = []
        for batch in self.batches:
            texts = [words(row["input_ids"][0].tolist()) for row in batch]
            targets = [words(row["decoder_input_ids"][0, 1:].tolist()) for row in batch]
            results += engine.score_batch(texts, targets)
        return [torch.tensor(result.log_probs) for result in results]


class _Generator(_Way):
    """Logits at all tokens."""

    what = "logits"

    def of_text(self, model: Any, row: dict[str, Tensor]) -> Tensor:
        logits: Tensor = Logits(model)(**row)[0]
        return logits

    def engine(self, folder: Path) -> list[Tensor]:
        import ctranslate2

        engine = ctranslate2.Generator(str(folder), **_options())
        return [
            output for batch in self.batches for output in _unpadded(engine.forward_batch(_numbers(batch, "input_ids")), batch)
        ]


class _Encoder(_Way):
    """Hidden states at all tokens."""

    what = "hidden states"

    def of_text(self, model: Any, row: dict[str, Tensor]) -> Tensor:
        states: Tensor = model.base_model(**row).last_hidden_state[0]
        return states

    def engine(self, folder: Path) -> list[Tensor]:
        import ctranslate2

        engine, outputs = ctranslate2.Encoder(str(folder), **_options()), []
        for batch in self.batches:
            kinds = {"token_type_ids": _numbers(batch, "token_type_ids")} if "token_type_ids" in batch[0] else {}
            states = engine.forward_batch(_numbers(batch, "input_ids"), **kinds).last_hidden_state
            outputs += _unpadded(states, batch)
        return outputs


def _options() -> dict[str, Any]:
    return {"device": "cpu", "compute_type": "float32", "intra_threads": torch.get_num_threads()}


def _numbers(batch: list[dict[str, Tensor]], name: str) -> list[list[int]]:
    return [row[name][0].tolist() for row in batch]


def _unpadded(outputs: Any, batch: list[dict[str, Tensor]]) -> list[Tensor]:
    """CTranslate2's outputs [batch, length, channels] as one tensor for each text."""
    array = torch.from_numpy(np.array(outputs))
    return [array[number, : row["input_ids"].shape[1]] for number, row in enumerate(batch)]
